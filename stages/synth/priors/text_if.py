"""Text-conditional prior in pixels: the first stage of DeepFloyd IF (64 px), prompts through a T5 encoder."""

from typing import Any

from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from stages.synth.priors.parts import frozen, load_encoder, load_tokenizer
from stages.synth.priors.text import TextPrior

TOKENS = 77  # what the network was trained with; T5 itself has no limit


class TextPriorIF(TextPrior):
    """An ``IFPipeline`` (UNet, T5 encoder, tokenizer); no VAE. Its learned variance is dropped like any other.

    The pipeline also thresholds every predicted image, which keeps large guidance scales from saturating. Guidance by a
    teacher expects predictions to stay where it moves them, so nothing is thresholded here: keep ``prior.cfg`` small.
    """

    def load(self) -> tuple[Any, None]:
        self.tokenizer = load_tokenizer(self, "tokenizer", T5Tokenizer)
        self.encoders = [frozen(load_encoder(self, "text_encoder", T5EncoderModel), self.device)]
        return self.load_unet(), None

    def embed(self, prompt: str) -> Tensor:
        """``[1, tokens, d]``; padding is masked, prompts are lower case, as in training."""
        padded = self.tokenizer(
            [prompt.lower().strip()], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).to(self.device)
        mask = None if self.device == "meta" else padded.attention_mask  # T5 looks at its values, which meta has not
        embedded: Tensor = self.encoders[0](padded.input_ids, attention_mask=mask)[0]
        return embedded
