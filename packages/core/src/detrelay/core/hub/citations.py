"""Papers to cite, by head (`model_type`), assigner, and program that the weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detrelay.core.hub.target_papers import target_papers

_STAGEINTERACTOR = """\
@inproceedings{teng2023stageinteractor,
  title     = {StageInteractor: Query-based Object Detector with Cross-stage Interaction},
  author    = {Teng, Yao and Liu, Haisong and Guo, Sheng and Wang, Limin},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2023},
  url       = {https://arxiv.org/abs/2304.04978}
}"""

_DEFORMABLE_DETR = """\
@inproceedings{zhu2021deformable,
  title     = {Deformable DETR: Deformable Transformers for End-to-End Object Detection},
  author    = {Zhu, Xizhou and Su, Weijie and Lu, Lewei and Li, Bin and Wang, Xiaogang and Dai, Jifeng},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2021},
  url       = {https://arxiv.org/abs/2010.04159}
}"""  # noqa: E501 - one entry of BibTeX a line

_DN_DETR = """\
@inproceedings{li2022dn,
  title     = {DN-DETR: Accelerate DETR Training by Introducing Query DeNoising},
  author    = {Li, Feng and Zhang, Hao and Liu, Shilong and Guo, Jian and Ni, Lionel M. and Zhang, Lei},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022},
  url       = {https://arxiv.org/abs/2203.01305}
}"""  # noqa: E501 - one entry of BibTeX a line

_DINO = """\
@inproceedings{zhang2023dino,
  title     = {DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection},
  author    = {Zhang, Hao and Li, Feng and Liu, Shilong and Zhang, Lei and Su, Hang and Zhu, Jun and Ni, Lionel M. and Shum, Heung-Yeung},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2023},
  url       = {https://arxiv.org/abs/2203.03605}
}"""  # noqa: E501 - one entry of BibTeX a line

_ADAMIXER = """\
@inproceedings{gao2022adamixer,
  title     = {AdaMixer: A Fast-Converging Query-Based Object Detector},
  author    = {Gao, Ziteng and Wang, Limin and Han, Bing and Guo, Sheng},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022},
  url       = {https://arxiv.org/abs/2203.16507}
}"""

_OF_HEADS = {
    "detrelay_stageinteractor": _STAGEINTERACTOR,
    "detrelay_deformable_detr": _DEFORMABLE_DETR,
    "detrelay_dn_detr": _DN_DETR,
    "detrelay_dino": _DINO,
}
_OF_ASSIGNERS = {"cross_stage": _STAGEINTERACTOR}
_OF_PROGRAMS = {"MCG-NJU/AdaMixer": _ADAMIXER}  # those whose method is not that of the head


def citations(
    model_type: str,
    assigner: str | None,
    program: str | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> list[str]:
    """BibTeX entries of the methods at work, each once; a method unknown here has none.

    Args:
        model_type: of the model's config.
        assigner: what the model was trained with, if it was trained here.
        program: what wrote the checkpoint that the weights were converted from.
        recipe: that the model was trained with, if it was trained here.
    """
    method = _OF_PROGRAMS.get(program or "") or _OF_HEADS.get(model_type)
    found = [method, _OF_ASSIGNERS.get(assigner or ""), *target_papers(recipe or {})]
    return list(dict.fromkeys(entry for entry in found if entry is not None))
