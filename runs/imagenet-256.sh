#!/bin/sh
# ImageNet at 256 px with class names as prompts: one VLM, both stages, 49,900 samples and their FID.
# Days of eight GPUs; sizes and schedules are in recipes/imagenet-256.yaml.
#
#     IMAGENET_DIR=/data/ILSVRC2012 VLM=facebook/Perception-LM-1B sh runs/imagenet-256.sh
#     VUGEN="torchrun --standalone --nproc-per-node 8 -m vugen_cli" ...   # the same on eight GPUs
#
# Stopped, the same line goes on where it was: what is finished is not made again.
set -eu
: "${IMAGENET_DIR:?an absolute path: the tars of train and val with the labels of val, or train/ and val/}"
: "${VLM:?a Hugging Face directory, its path absolute, or a hub id; its vision encoder sees at least 224 px}"
OUT=${OUT:-out/imagenet-256}      # everything is written here
SIZE=${SIZE:-256}                 # pixels a side; others want EXTRA="--set decoder.image_size=..." too
MERGE=${MERGE:-2}                 # 2 x 2 of the VLM's places are one: 256 tokens of 1,024; 1 if it has 256
PER_CLASS=${PER_CLASS:-50}        # samples of each first name: two classes share theirs with another
FEATURES=${FEATURES:-inception}   # what sees the images; only Inception's distance is FID
VUGEN=${VUGEN:-vugen}             # how the tool is started
EXTRA=${EXTRA:-}                  # added to both training commands, as in EXTRA="--set decoder.preset=B"
mkdir -p "$OUT"
cd "$OUT"

# -----------------------------------------------------------------------------
# Images, as shards; "tench", "great white shark" and the other names of a class are its captions.

$VUGEN prepare --dataset imagenet --source "$IMAGENET_DIR" --size "$SIZE" --out data/imagenet
$VUGEN prepare --dataset imagenet --source "$IMAGENET_DIR" --size "$SIZE" --out data/imagenet --split val

# -----------------------------------------------------------------------------
# Stage 1: z to z̃ of 64 channels, with a pixel decoder; LPIPS wants two files of weights, or
# EXTRA="--set decoder.losses.lpips=0". How much survives is the ceiling of all that follows.

[ -e reducer.safetensors ] ||
    $VUGEN train-reducer --recipe imagenet-256 --data data/imagenet --vlm "$VLM" --set reducer.merge="$MERGE" $EXTRA
[ -e reconstructions/reconstruction.json ] ||
    $VUGEN reconstruct --images data/imagenet --count 5000

# -----------------------------------------------------------------------------
# Stage 2: the velocity field in z̃.

[ -e sampler.safetensors ] ||
    $VUGEN train-sampler --recipe imagenet-256 --reducer reducer.safetensors --data data/imagenet $EXTRA

# -----------------------------------------------------------------------------
# Each class by its first name, and the distance of the samples to the val split. Published FIDs are to the training
# set: for those give `vugen score` its images or statistics as --reference.

python3 - <<'PROMPTS'
import json, pathlib
classes = json.loads(pathlib.Path("data/imagenet/dataset.json").read_text())["classes"]
pathlib.Path("classes.txt").write_text("".join(names.split(", ")[0] + "\n" for names in classes))
PROMPTS
[ -e samples/samples.jsonl ] ||
    $VUGEN sample --prompts classes.txt -n "$PER_CLASS" --sampler sampler.safetensors
$VUGEN score --fid --pr --features "$FEATURES" --images samples --reference data/imagenet
