"""RULER's prompts: the words a model sees, as protocol data.

The texts in this file are those of RULER (https://github.com/NVIDIA/RULER, commit c3f5e3b, Copyright (c) 2024 NVIDIA
CORPORATION, Apache License 2.0). A score is comparable with others only under the same words, so they stay as they are,
with the original's grammar; a test holds them against their published digests. Everything else about the tasks,
generators and scoring, is this package's own (``ruler_tasks.py``, ``ruler_scoring.py``).

    >>> from evaluation.ruler_prompts import NEEDLE
    >>> NEEDLE.format(kind="numbers", key="brave-otter", value=1234567)
    'One of the special magic numbers for brave-otter is: 1234567.'

A prompt is a template, a space, and the answer's beginning, which the model is to continue.
"""

from __future__ import annotations

import hashlib

NIAH = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} "
    "mentioned in the provided text?"
)
NIAH_PREFIX = " The special magic {type_needle_v} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)

VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all "
    "variables that are assigned the value {query} in the text above."
)
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the value "
    "{query}, they are: "
)

CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
    "most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"

FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"

QA = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe "
    "following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the "
    "answer and do not output any other words.\n\nQuestion: {query}"
)
QA_PREFIX = " Answer:"
DOCUMENT = "Document {i}:\n{document}"


def singular(text: str) -> str:
    """A needle prompt that asks for one value, as RULER rewrites it: "A special magic number is hidden ..." """
    return text.replace("Some", "A").replace("are all", "is").replace("are", "is")


def digest() -> str:
    """sha256 of every text above, 12 digits; part of a result's protocol."""
    texts = (
        NIAH,
        NIAH_PREFIX,
        NEEDLE,
        *NOISE,
        VT,
        VT_PREFIX,
        CWE,
        CWE_PREFIX,
        FWE,
        FWE_PREFIX,
        QA,
        QA_PREFIX,
        DOCUMENT,
    )
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
