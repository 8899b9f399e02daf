"""Settings of short runs, and what they leave behind."""

from stages.settings import DistillSettings

TWO = {"students": ["digits-cnn-small", "resnet8"]}
SMALL = {"epochs": 3, "batch_size": 8, "val_fraction": 0.2, "optimizer": {"lr": 0.05}}
REGION = {"loss": {"kd": 1.0, "ce": 0.5, "cam": 1.0, "gradcam": 1.0}, "augment": {"cutmix": 0.5, "flip": True}}


def settings(**changes) -> DistillSettings:
    return DistillSettings.model_validate(SMALL | changes)


def weights(folder, name="digits-cnn-small") -> bytes:
    return (folder / name / "model.safetensors").read_bytes()
