"""Let torchvision's wheel, which is linked to CUDA, be imported beside a CPU build of torch.

Its compiled operators do not load there, and `import torchvision` stops at registering the fake of
the missing `torchvision::nms`. Declaring the two operators first is enough for its transforms, timm
and open_clip; the operators themselves still do not work. Delete when PyPI carries a CPU wheel of
torchvision. install_peer.sh copies this file into the peer venv, with a .pth line that imports it.
"""

import sys


class DeclareOperators:
    """A meta-path finder that finds nothing: it only notices that torchvision is being imported."""

    library = None

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torchvision" and DeclareOperators.library is None:
            import torch  # not at start-up: a .pth file runs in every process of the venv

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "FRAGMENT")
                library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                DeclareOperators.library = library


sys.meta_path.insert(0, DeclareOperators())
