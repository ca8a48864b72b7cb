"""The publications that memlens cites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """A publication.

    Attributes:
        authors: As cited, "and others" in place of a long tail.
        year: Of the version that is cited.
        title: In full.
        where: Proceedings, journal or archive number.
        url: Where it can be read; empty where no stable address is known.
    """

    authors: str
    year: int
    title: str
    where: str
    url: str = ""


def _arxiv(authors: str, year: int, title: str, number: str, venue: str = "") -> Reference:
    where = f"{venue}, arXiv:{number}" if venue else f"arXiv:{number}"
    return Reference(authors, year, title, where, f"https://arxiv.org/abs/{number}")


REFERENCES: Mapping[str, Reference] = {
    "belrose2023": _arxiv(
        "Belrose, N., Furman, Z., Smith, L., Halawi, D., Ostrovsky, I., McKinney, L., Biderman, S., and "
        "Steinhardt, J.",
        2023,
        "Eliciting Latent Predictions from Transformers with the Tuned Lens",
        "2303.08112",
    ),
    "biderman2023": _arxiv(
        "Biderman, S., Schoelkopf, H., and others",
        2023,
        "Pythia: A Suite for Analyzing Large Language Models Across Training and Scaling",
        "2304.01373",
        "ICML 2023",
    ),
    "black2021": Reference(
        "Black, S., Gao, L., Wang, P., Leahy, C., and Biderman, S.",
        2021,
        "GPT-Neo: Large Scale Autoregressive Language Modeling with Mesh-Tensorflow",
        "Zenodo",
        "https://doi.org/10.5281/zenodo.5297715",
    ),
    "carlini2021": _arxiv(
        "Carlini, N., Tramèr, F., Wallace, E., and others",
        2021,
        "Extracting Training Data from Large Language Models",
        "2012.07805",
        "USENIX Security 2021",
    ),
    "carlini2023": _arxiv(
        "Carlini, N., Ippolito, D., Jagielski, M., Lee, K., Tramèr, F., and Zhang, C.",
        2023,
        "Quantifying Memorization Across Neural Language Models",
        "2202.07646",
        "ICLR 2023",
    ),
    "chen2026": _arxiv(
        "Chen, B., Han, N., and Miyao, Y.",
        2026,
        "A Comparative Analysis of LLM Memorization at Statistical and Internal Levels: Cross-Model "
        "Commonalities and Model-Specific Signatures",
        "2603.21658",
    ),
    "efron1979": Reference(
        "Efron, B.",
        1979,
        "Bootstrap Methods: Another Look at the Jackknife",
        "The Annals of Statistics 7(1), 1-26",
        "https://doi.org/10.1214/aos/1176344552",
    ),
    "elhage2021": Reference(
        "Elhage, N., Nanda, N., Olsson, C., and others",
        2021,
        "A Mathematical Framework for Transformer Circuits",
        "Transformer Circuits Thread",
        "https://transformer-circuits.pub/2021/framework/index.html",
    ),
    "geng2023": Reference(
        "Geng, X., and Liu, H.",
        2023,
        "OpenLLaMA: An Open Reproduction of LLaMA",
        "GitHub",
        "https://github.com/openlm-research/open_llama",
    ),
    "goldowskydill2023": _arxiv(
        "Goldowsky-Dill, N., MacLeod, C., Sato, L., and Arora, A.",
        2023,
        "Localizing Model Behavior with Path Patching",
        "2304.05969",
    ),
    "groeneveld2024": _arxiv(
        "Groeneveld, D., Beltagy, I., Walsh, P., and others",
        2024,
        "OLMo: Accelerating the Science of Language Models",
        "2402.00838",
        "ACL 2024",
    ),
    "hanna2024": _arxiv(
        "Hanna, M., Pezzelle, S., and Belinkov, Y.",
        2024,
        "Have Faith in Faithfulness: Going Beyond Circuit Overlap When Finding Model Mechanisms",
        "2403.17806",
    ),
    "haviv2023": _arxiv(
        "Haviv, A., Cohen, I., Gidron, J., Schuster, R., Goldberg, Y., and Geva, M.",
        2023,
        "Understanding Transformer Memorization Recall Through Idioms",
        "2210.03588",
        "EACL 2023",
    ),
    "hayes2025": _arxiv(
        "Hayes, J., Swanberg, M., Chaudhari, H., Yona, I., Shumailov, I., Nasr, M., Choquette-Choo, C. A., "
        "Lee, K., and Cooper, A. F.",
        2025,
        "Measuring Memorization in Language Models via Probabilistic Extraction",
        "2410.19482",
    ),
    "li2023": _arxiv(
        "Li, R., Ben Allal, L., Zi, Y., and others",
        2023,
        "StarCoder: May the Source Be with You!",
        "2305.06161",
    ),
    "lozhkov2024": _arxiv(
        "Lozhkov, A., Li, R., Ben Allal, L., and others",
        2024,
        "StarCoder 2 and The Stack v2: The Next Generation",
        "2402.19173",
    ),
    "meng2022": _arxiv(
        "Meng, K., Bau, D., Andonian, A., and Belinkov, Y.",
        2022,
        "Locating and Editing Factual Associations in GPT",
        "2202.05262",
        "NeurIPS 2022",
    ),
    "menta2025": _arxiv(
        "Menta, T. R., Agrawal, S., and Agarwal, C.",
        2025,
        "Analyzing Memorization in Large Language Models through the Lens of Model Attribution",
        "2501.05078",
        "NAACL 2025",
    ),
    "nanda2022": Reference(
        "Nanda, N., and Bloom, J.",
        2022,
        "TransformerLens",
        "GitHub",
        "https://github.com/TransformerLensOrg/TransformerLens",
    ),
    "nostalgebraist2020": Reference(
        "nostalgebraist",
        2020,
        "interpreting GPT: the logit lens",
        "LessWrong",
        "https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens",
    ),
    "olmo2024": _arxiv("Team OLMo", 2024, "2 OLMo 2 Furious", "2501.00656"),
    "olmo2025": _arxiv("Team Olmo", 2025, "Olmo 3", "2512.13961"),
    "shi2024": _arxiv(
        "Shi, W., Ajith, A., Xia, M., and others",
        2024,
        "Detecting Pretraining Data from Large Language Models",
        "2310.16789",
        "ICLR 2024",
    ),
    "sundararajan2017": _arxiv(
        "Sundararajan, M., Taly, A., and Yan, Q.",
        2017,
        "Axiomatic Attribution for Deep Networks",
        "1703.01365",
        "ICML 2017",
    ),
    "syed2023": _arxiv(
        "Syed, A., Rager, C., and Conmy, A.",
        2023,
        "Attribution Patching Outperforms Automated Circuit Discovery",
        "2310.10348",
    ),
    "wang2023": _arxiv(
        "Wang, K., Variengien, A., Conmy, A., Shlegeris, B., and Steinhardt, J.",
        2023,
        "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
        "2211.00593",
        "ICLR 2023",
    ),
    "wilson1927": Reference(
        "Wilson, E. B.",
        1927,
        "Probable Inference, the Law of Succession, and Statistical Inference",
        "Journal of the American Statistical Association 22(158), 209-212",
        "https://doi.org/10.1080/01621459.1927.10502953",
    ),
    "zhang2023": _arxiv(
        "Zhang, C., Ippolito, D., Lee, K., Jagielski, M., Tramèr, F., and Carlini, N.",
        2023,
        "Counterfactual Memorization in Neural Language Models",
        "2112.12938",
        "NeurIPS 2023",
    ),
    "zhang2024": _arxiv(
        "Zhang, J., Sun, J., Yeats, E., and others",
        2024,
        "Min-K%++: Improved Baseline for Detecting Pre-Training Data from Large Language Models",
        "2404.02936",
    ),
}
"""What memlens cites, by key."""
