"""Everyday words for the classes of Tiny-ImageNet, so that captions say "dog" as well as "Chihuahua".

Written from the class names alone. Words that no class of Tiny-ImageNet stands for ("airplane", "horse") are absent:
the prior does not know them.
"""

GROUPS = {
    "cat": ["Egyptian cat", "tabby", "Persian cat"],
    "dog": [
        *("German shepherd", "Labrador retriever", "golden retriever", "Yorkshire terrier", "Chihuahua"),
        "standard poodle",
    ],
    "big cat": ["lion", "cougar"],
    "bear": ["brown bear", "lesser panda", "koala"],
    "monkey": ["baboon", "chimpanzee", "orangutan"],
    "bird": ["albatross", "king penguin", "goose", "black stork"],
    "frog": ["bullfrog", "tailed frog"],
    "lizard": ["European fire salamander", "American alligator"],
    "snake": ["boa constrictor"],
    "fish": ["goldfish"],
    "hoofed animal": ["Arabian camel", "gazelle", "ox", "bighorn", "bison", "hog"],
    "elephant": ["African elephant"],
    "insect": [
        *("cockroach", "mantis", "ladybug", "bee", "dragonfly", "fly", "grasshopper", "walking stick", "centipede"),
        *("monarch", "sulphur butterfly"),
    ],
    "butterfly": ["monarch", "sulphur butterfly"],
    "spider": ["tarantula", "black widow", "scorpion"],
    "sea animal": [
        *("sea cucumber", "spiny lobster", "American lobster", "jellyfish", "dugong", "brain coral", "sea slug"),
        *("coral reef", "trilobite"),
    ],
    "snail": ["snail", "slug"],
    "car": ["limousine", "sports car", "convertible", "beach wagon", "go-kart"],
    "truck": ["moving van", "police van", "tractor"],
    "bus": ["school bus", "trolleybus"],
    "train": ["freight car", "bullet train"],
    "boat": ["gondola", "lifeboat"],
    "bridge": ["suspension bridge", "steel arch bridge", "viaduct"],
    "building": ["barn", "triumphal arch", "cliff dwelling", "water tower", "beacon", "butcher shop", "barbershop"],
    "landscape": ["cliff", "seashore", "lakeside", "alp", "dam"],
    "fruit": ["lemon", "banana", "orange", "pomegranate"],
    "vegetable": ["bell pepper", "cauliflower", "mushroom"],
    "food": ["pizza", "potpie", "ice cream", "pretzel", "guacamole", "mashed potato", "meat loaf", "ice lolly"],
    "bottle": ["pop bottle", "beer bottle", "pill bottle", "water jug"],
    "furniture": ["rocking chair", "dining table", "desk", "chest", "refrigerator"],
    "clothes": [
        *("cardigan", "fur coat", "academic gown", "miniskirt", "vestment", "apron", "military uniform", "kimono"),
        *("poncho", "bikini", "swimming trunks", "sock", "bow tie"),
    ],
    "machine": ["remote control", "CD player", "pay-phone", "computer keyboard", "iPod", "sewing machine"],
    "instrument": ["oboe", "organ", "brass"],
    "ball": ["volleyball", "basketball", "rugby ball"],
}


def captions(name: str) -> list[str]:
    """Every way a class is called: by its own name (twice as often) and by its everyday words."""
    own = name.lower()
    words = [word for word, members in GROUPS.items() if name in members and word != own]
    called = [own, own, *words, *(f"{own}, {word}" for word in words)]
    return [template.format(c) for c in called for template in ("{}", "a photo of {}", "a realistic photo of {}")]
