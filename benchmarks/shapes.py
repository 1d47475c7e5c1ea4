"""The shapes of the released networks' operators, batch 1."""

#: name: (channels, height and width, groups); imagenet64 normalises with FiLM, lsun256 after an addition.
GROUP_NORM = {
    "imagenet64-192x64": (192, 64, 32),
    "imagenet64-576x16": (576, 16, 32),
    "imagenet64-1536x8": (1536, 8, 32),
    "lsun256-256x256": (256, 256, 32),
}

#: name: (heads, tokens, channels a head)
ATTENTION = {
    "imagenet64-T1024": (6, 1024, 64),
    "imagenet64-T256": (9, 256, 64),
    "imagenet64-T64": (12, 64, 64),
    "lsun256-T1024": (8, 1024, 64),
}

#: name: shape of a sample
STEP = {"imagenet64": (3, 64, 64), "lsun256": (3, 256, 256)}
