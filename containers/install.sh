#!/bin/sh
# Install a role's pinned libraries into /opt/venv; runs only inside the Dockerfile.
#     install.sh ROLE none|cpu|cuda
set -eu
role=$1 accelerator=$2

# The lists are complete, so nothing is resolved.
set -- --no-deps -r "requirements/$role.txt"
case $accelerator in
    cuda) set -- "$@" -r requirements/cuda.txt ;;
    cpu) set -- "$@" --find-links /wheels ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ;;
esac
/opt/pip/bin/pip --python /opt/venv/bin/python install --disable-pip-version-check --progress-bar off "$@"

# The index's plain torch is a CUDA build, and useless without its libraries: say so now and not in the first step.
if [ "$accelerator" != none ]; then
    WANTED=$accelerator /opt/venv/bin/python -c '
import os, sys, torch
built = "cuda" if torch.version.cuda else "cpu"
sys.exit(0 if built == os.environ["WANTED"] else f"install.sh: this torch is built for {built}; give TORCH_INDEX or WHEELS")'
fi

# Tests and headers of libraries: about a tenth of the image, read by no step.
cd /opt/venv/lib/python3.11/site-packages
find . -type d -name tests -prune -exec rm -rf {} +
rm -rf torch/test torch/include pyarrow/include
