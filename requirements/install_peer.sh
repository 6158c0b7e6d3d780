#!/usr/bin/env bash
# Build the venv the tests marked `peer` run open_clip in (2 minutes, 1.5 GB).
#   requirements/install_peer.sh [DIRECTORY] [PYTHON]        default: .venv-peer python3
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${1:-$root/.venv-peer}"
"${2:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/requirements/constraints.txt" "$@"; }
# What the peers import, with torch pinned; then the peers alone, which would otherwise bring a CUDA torch.
pip torch==2.13.0 transformers tokenizers numpy pillow regex ftfy tqdm huggingface-hub safetensors pyyaml scikit-learn pandas
pip --no-deps -r "$root/requirements/peer.txt"
site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
cp "$root/requirements/torchvision_without_cuda.py" "$site/"
echo "import torchvision_without_cuda" > "$site/torchvision_without_cuda.pth"
"$venv/bin/python" -c 'import open_clip; print("open_clip", open_clip.__version__)'
