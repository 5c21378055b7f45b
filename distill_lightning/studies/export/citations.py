"""How the papers behind the methods are cited, in BibTeX."""

from __future__ import annotations


def _entry(key: str, authors: str, title: str, year: int, arxiv: str) -> str:
    fields = {
        "author": authors, "title": f"{{{title}}}", "year": str(year), "eprint": arxiv, "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{arxiv}",
    }  # fmt: skip
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@misc{{{key},", *lines, "}"])


_FEED = _entry(
    "park2019feed",
    "Park, SeongUk and Kwak, Nojun",
    "FEED: Feature-level Ensemble for Knowledge Distillation",
    2019,
    "1909.10754",
)
_KD = _entry(
    "hinton2015distilling",
    "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
    "Distilling the Knowledge in a Neural Network",
    2015,
    "1503.02531",
)
_SELF_KD = _entry(
    "kim2020selfkd",
    "Kim, Kyungyul and Ji, ByeongMoon and Yoon, Doyoung and Hwang, Sangheum",
    "Self-Knowledge Distillation with Progressive Refinement of Targets",
    2020,
    "2006.12000",
)
_MEAL_V2 = _entry(
    "shen2020mealv2",
    "Shen, Zhiqiang and Savvides, Marios",
    "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks",
    2020,
    "2009.08453",
)
_EXTRACURRICULAR = _entry(
    "pouransari2020extracurricular",
    "Pouransari, Hadi and Javaheripi, Mojan and Sharma, Vinay and Tuzel, Oncel",
    "Extracurricular Learning: Knowledge Transfer Beyond Empirical Distribution",
    2020,
    "2007.00051",
)
_COMPRESSION = _entry(
    "oneill2020overview",
    "O'Neill, James",
    "An Overview of Neural Network Compression",
    2020,
    "2006.03669",
)

CITATIONS = {
    "FEEDModule": _FEED,
    "KDModule": _KD,
    "SelfKDModule": _SELF_KD,
    "MEALV2Module": _MEAL_V2,
    "ExtracurricularModule": _EXTRACURRICULAR,
    "CompressionBaseline": _COMPRESSION,
}
"""By the name of the module's class; plain supervised training is nobody's."""
