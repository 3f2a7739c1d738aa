#!/usr/bin/env bash
# Rivals in a throw-away environment, ours and theirs in one run: bash bench/rivals.sh [quantize | vae_rivals | ebm_loops | igpt_rivals | pgm_rivals | flows_rivals] [options]
# torch is the project's own pin and comes first; each rival is then installed without its dependencies, so that it stays.
set -euo pipefail
cd "$(dirname "$0")/.."
what=rivals
case "${1:-}" in quantize | vae_rivals | ebm_loops | igpt_rivals | pgm_rivals | flows_rivals) what=$1; shift ;; esac
where=$(mktemp -d)
trap 'rm -rf "$where"' EXIT
"${PYTHON:-python3}" -m venv "$where/venv"
pip="$where/venv/bin/python -m pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0 numpy==2.2.6 einops tqdm
if [ $what = quantize ]; then
    $pip einx==0.4.3
    $pip --no-deps vector-quantize-pytorch==1.32.0 torch-einops-utils==0.2.0 loguru==0.7.3
elif [ $what = vae_rivals ]; then
    $pip matplotlib
    $pip --no-deps pythae==0.1.2 pydantic pydantic_core annotated_types typing_inspection imageio pillow cloudpickle \
        scipy scikit-learn joblib threadpoolctl
elif [ $what = ebm_loops ]; then
    $pip --no-deps torchebm==0.8.9
elif [ $what = pgm_rivals ]; then
    $pip networkx scipy pandas scikit-learn opt_einsum joblib matplotlib
    $pip --no-deps pgmpy==1.1.2 pyAgrum==3.3.1 scikit-base packaging statsmodels patsy pyparsing
elif [ $what = igpt_rivals ]; then
    $pip torch==2.13.0 transformers==5.23.0 x-transformers==2.31.10
elif [ $what = flows_rivals ]; then
    $pip scipy matplotlib
    $pip --no-deps zuko==1.6.0 nflows==0.14 torchcfm==1.0.7 flow_matching==1.0.10 torchdiffeq torchdyn POT
else
    $pip --no-deps diffusers==0.42.1 azula==0.11.1
    # what importing diffusers' schedulers needs
    $pip --no-deps huggingface_hub safetensors regex requests urllib3 importlib_metadata zipp Pillow packaging pyyaml \
        httpx httpx2 httpcore2 anyio idna certifi h11 sniffio truststore
fi
"$where/venv/bin/python" bench/$what.py "$@"
