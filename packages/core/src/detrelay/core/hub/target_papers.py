"""Papers of training targets, by the parts that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_CVPR = "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)"
_ICCV = "IEEE/CVF International Conference on Computer Vision (ICCV)"
_NEURIPS = "Advances in Neural Information Processing Systems (NeurIPS)"
# key: authors, title, where, year, page
_PAPERS = {
    "jia2023detrs": (
        "Jia, Ding and Yuan, Yuhui and He, Haodi and Wu, Xiaopei and Yu, Haojun and Lin, Weihong "
        "and Sun, Lei and Zhang, Chao and Hu, Han",
        "DETRs with Hybrid Matching",
        *(_CVPR, 2023, "https://arxiv.org/abs/2207.13080"),
    ),
    "chen2023group": (
        "Chen, Qiang and Chen, Xiaokang and Wang, Jian and Zhang, Shan and Yao, Kun and Feng, "
        "Haocheng and Han, Junyu and Ding, Errui and Zeng, Gang and Wang, Jingdong",
        "Group DETR: Fast DETR Training with Group-Wise One-to-Many Assignment",
        *(_ICCV, 2023, "https://arxiv.org/abs/2207.13085"),
    ),
    "chen2023enhanced": (
        "Chen, Fangyi and Zhang, Han and Hu, Kai and Huang, Yu-Kai and Zhu, Chenchen and Savvides, "
        "Marios",
        "Enhanced Training of Query-Based Object Detection via Selective Query Recollection",
        *(_CVPR, 2023, "https://arxiv.org/abs/2212.07593"),
    ),
    "hu2023dac": (
        "Hu, Zhengdong and Sun, Yifan and Wang, Jingdong and Yang, Yi",
        "DAC-DETR: Divide the Attention Layers and Conquer",
        *(_NEURIPS, 2023, "https://github.com/huzhengdongcs/DAC-DETR"),
    ),
    "zhao2024ms": (
        "Zhao, Chuyang and Sun, Yifan and Wang, Wenhao and Chen, Qiang and Ding, Errui and Yang, "
        "Yi and Wang, Jingdong",
        "MS-DETR: Efficient DETR Training with Mixed Supervision",
        *(_CVPR, 2024, "https://arxiv.org/abs/2401.03989"),
    ),
    "peng2025dfine": (
        "Peng, Yansong and Li, Hebei and Wu, Peixi and Zhang, Yueyi and Sun, Xiaoyan and Wu, Feng",
        "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement",
        "International Conference on Learning Representations (ICLR)",
        *(2025, "https://arxiv.org/abs/2410.13842"),
    ),
    "ouyangzhang2022nms": (
        r"Ouyang-Zhang, Jeffrey and Cho, Jang Hyun and Zhou, Xingyi and Kr{\"a}henb{\"u}hl, "
        "Philipp",
        "NMS Strikes Back",
        *("arXiv preprint", 2022, "https://arxiv.org/abs/2212.06137"),
    ),
    "ge2021ota": (
        "Ge, Zheng and Liu, Songtao and Li, Zeming and Yoshie, Osamu and Sun, Jian",
        "OTA: Optimal Transport Assignment for Object Detection",
        *(_CVPR, 2021, "https://arxiv.org/abs/2103.14259"),
    ),
    "sun2021rethinking": (
        "Sun, Zhiqing and Cao, Shengcao and Yang, Yiming and Kitani, Kris",
        "Rethinking Transformer-based Set Prediction for Object Detection",
        *(_ICCV, 2021, "https://arxiv.org/abs/2011.10881"),
    ),
    "cai2023aligndetr": (
        "Cai, Zhi and Liu, Songtao and Wang, Guodong and Ge, Zheng and Zhang, Xiangyu and Huang, "
        "Di",
        "Align-DETR: Improving DETR with Simple IoU-aware BCE loss",
        *("arXiv preprint", 2023, "https://arxiv.org/abs/2304.07527"),
    ),
    "liu2023detection": (
        "Liu, Shilong and Ren, Tianhe and Chen, Jiayu and Zeng, Zhaoyang and Zhang, Hao and Li, "
        "Feng and Li, Hongyang and Huang, Jun and Su, Hang and Zhu, Jun and Zhang, Lei",
        "Detection Transformer with Stable Matching",
        *(_ICCV, 2023, "https://arxiv.org/abs/2304.04742"),
    ),
    "pu2023rank": (
        "Pu, Yifan and Liang, Weicong and Hao, Yiduo and Yuan, Yuhui and Yang, Yukang and Zhang, "
        "Chao and Hu, Han and Huang, Gao",
        "Rank-DETR for High Quality Object Detection",
        *(_NEURIPS, 2023, "https://arxiv.org/abs/2310.08854"),
    ),
    "zhao2024detrs": (
        "Zhao, Yian and Lv, Wenyu and Xu, Shangliang and Wei, Jinman and Wang, Guanzhong and Dang, "
        "Qingqing and Liu, Yi and Chen, Jie",
        "DETRs Beat YOLOs on Real-time Object Detection",
        *(_CVPR, 2024, "https://arxiv.org/abs/2304.08069"),
    ),
    "huang2025deim": (
        "Huang, Shihua and Lu, Zhichao and Cun, Xiaodong and Yu, Yongjun and Zhou, Xiao and Shen, "
        "Xi",
        "DEIM: DETR with Improved Matching for Fast Convergence",
        *(_CVPR, 2025, "https://arxiv.org/abs/2412.04234"),
    ),
    "carion2020end": (
        "Carion, Nicolas and Massa, Francisco and Synnaeve, Gabriel and Usunier, Nicolas and "
        "Kirillov, Alexander and Zagoruyko, Sergey",
        "End-to-End Object Detection with Transformers",
        "European Conference on Computer Vision (ECCV)",
        *(2020, "https://arxiv.org/abs/2005.12872"),
    ),
}
_OF_ASSIGNERS = {
    "repeated": "jia2023detrs",
    "rank_weighted": "cai2023aligndetr",
    "one_to_many": "zhao2024ms",
    "union": "peng2025dfine",
    "iou": "ouyangzhang2022nms",
    "simota": "ge2021ota",
    "restricted": "sun2021rethinking",
}
_OF_CLASS_LOSSES = {
    "softmax": "carion2020end",
    "varifocal": "zhao2024detrs",
    "matchability": "huang2025deim",
    "ia_bce": "cai2023aligndetr",
    "position_supervised": "liu2023detection",
    "rank_giou": "pu2023rank",
}
_OF_COSTS = {
    "softmax": "carion2020end",
    "position_modulated": "liu2023detection",
    "high_order": "pu2023rank",
}
# settings of a model that add a pass, and the value without it
_OF_PASSES = {
    "hybrid_queries": (0, "jia2023detrs"),
    "query_groups": (1, "chen2023group"),
    "recollect_queries": (False, "chen2023enhanced"),
    "without_self_attention": (False, "hu2023dac"),
    "one_to_many_branch": (False, "zhao2024ms"),
}


def target_papers(recipe: Mapping[str, Any]) -> list[str]:
    """BibTeX entries of the training targets of a recipe, each once.

    Cross-stage labels and parts that every DETR has are not among them.

    Args:
        recipe: nested values, as `Recipe.to_mapping` gives them; tables may be missing.
    """
    return [_entry(key) for key in dict.fromkeys(_keys(recipe)) if key is not None]


def _keys(recipe: Mapping[str, Any]) -> Iterator[str | None]:
    model = recipe.get("model") or {}
    for setting, (off, key) in _OF_PASSES.items():
        yield key if model.get(setting, off) != off else None
    groups = list((recipe.get("groups") or {}).values())
    for table in (recipe, *groups):
        yield from _of_assigner(table.get("assigner"))
        yield _OF_CLASS_LOSSES.get(str((table.get("loss") or {}).get("class_loss")))


def _of_assigner(settings: Mapping[str, Any] | None) -> Iterator[str | None]:
    while settings:
        yield _OF_ASSIGNERS.get(str(settings.get("name")))
        for cost in settings.get("costs") or ():
            name = cost.get("name") if isinstance(cost, Mapping) else str(cost).split(":")[0]
            yield _OF_COSTS.get(str(name))
        settings = settings.get("base")


def _entry(key: str) -> str:
    authors, title, where, year, page = _PAPERS[key]
    kind, field = ("misc", "note") if where == "arXiv preprint" else ("inproceedings", "booktitle")
    values = {"title": title, "author": authors, field: where, "year": year, "url": page}
    lines = [f"  {name:<9} = {{{value}}}" for name, value in values.items()]
    return f"@{kind}{{{key},\n" + ",\n".join(lines) + "\n}"
