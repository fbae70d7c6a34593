#!/bin/sh
# The paper's comparison (arXiv 2510.06529): the same VLM, pictures and steps; one sampler draws the VLM's own reduced
# embeddings, the baseline draws VAE latents. docs/paper.md says which table and figure each part is, and what it costs.
#
# StockMix is YFCC100M, CC12M and a third set of your own. The first two are lists of addresses; img2dataset downloads
# them into shards:
#
#     img2dataset --url_list cc12m.tsv --input_format tsv --url_col url --caption_col caption \
#         --output_format webdataset --output_folder /raw/cc12m --image_size 288 --resize_mode keep_ratio
#
#     YFCC100M=/raw/yfcc100m CC12M=/raw/cc12m THIRD=/raw/mine.csv COCO_DIR=/raw/coco PROMPTS=/raw/coco-30k.txt \
#         VLM=facebook/Perception-LM-1B sh runs/paper.sh
#
# All paths must be absolute: the program works inside $OUT.
# Stopped, the same line goes on where it was: what is finished is not made again.
set -eu
: "${YFCC100M:?a folder of webdataset shards}" "${CC12M:?a folder of webdataset shards}"
: "${THIRD:?captioned images: a folder, or a .csv, .tsv or .jsonl of path and caption}"
: "${COCO_DIR:?annotations/ with val2014/ or val2017/}" "${PROMPTS:?a prompt a line: captions of COCO val}"
: "${VLM:?a Hugging Face directory or a hub id; its vision encoder sees at least 224 px}"
OUT=${OUT:-out/paper}                      # everything is written here
VAE=${VAE:-stabilityai/sd-vae-ft-mse}      # of the baseline and of the latent diffusion decoder
DPG_BENCH=${DPG_BENCH:-}                   # dpg_bench/ of the ELLA repository; none: that table is left out
JUDGE=${JUDGE:-$VLM}                       # the VLM that answers DPG-Bench's questions
SIZE=${SIZE:-256}                          # pixels a side; others want decoder.image_size in EXTRA too
MERGE=${MERGE:-2}                          # 2 x 2 of the VLM's places are one: 256 tokens of 1,024; 1 if it has 256
KEEP=${KEEP:-10000}                        # steps between the checkpoints of the curves over training
SEEDS=${SEEDS:-64}                         # pictures of the one prompt whose diversity is measured
FEATURES=${FEATURES:-inception}            # what sees the images; only Inception's distance is FID
VUGEN=${VUGEN:-vugen}                      # or "torchrun --standalone --nproc-per-node 8 -m vugen_cli"
EXTRA=${EXTRA:-}                           # added to every training command, as in EXTRA="--set decoder.preset=B"
mkdir -p "$OUT"
cd "$OUT"

# train STAGE OUT OPTIONS...: nothing if OUT is there; a training that was stopped goes on by itself.
train() {
    stage=$1 made=$2
    shift 2
    [ -e "$made" ] || $VUGEN "train-$stage" --recipe stockmix-256 "$@" --out "$made" $EXTRA
}

# -----------------------------------------------------------------------------
# Pictures. recipes/stockmix-256.yaml mixes the first three by weight; COCO is only compared with.

$VUGEN prepare --dataset webdataset --source "$YFCC100M" --size "$SIZE" --out data/yfcc100m
$VUGEN prepare --dataset webdataset --source "$CC12M" --size "$SIZE" --out data/cc12m
$VUGEN prepare --dataset captions --source "$THIRD" --size "$SIZE" --out data/mine
$VUGEN prepare --dataset coco --source "$COCO_DIR" --split val --size "$SIZE" --out data/coco

# -----------------------------------------------------------------------------
# Stage 1, four times: z̃, the baseline's VAE latents, all of z, and z̃ drawn by latent diffusion instead of pixels.

# Both arms draw 256 tokens, and flow.shift follows from how many numbers these are. LPIPS wants two files of weights.

train reducer reducer.safetensors --vlm "$VLM" --set reducer.merge="$MERGE"
train reducer baseline.safetensors --vlm "$VLM" \
    --set reducer.kind=vae --set decoder.vae="$VAE" --set reducer.merge=2
train reducer identity.safetensors --vlm "$VLM" --set reducer.kind=identity
train reducer ldm.safetensors --reducer reducer.safetensors --set decoder.kind=ldm --set decoder.vae="$VAE" \
    --set decoder.losses.lpips=0 --set decoder.losses.repa=0

# -----------------------------------------------------------------------------
# Stage 2, twice.

train sampler sampler.safetensors --reducer reducer.safetensors --set train_sampler.keep_every="$KEEP"
train sampler baseline-sampler.safetensors --reducer baseline.safetensors --set train_sampler.keep_every="$KEEP"

# -----------------------------------------------------------------------------
# The tables: COCO FID, with either decoder, and DPG-Bench.

# table NAME SAMPLER OPTIONS...: draw the prompts, once, and score them.
table() {
    name=$1 sampler=$2
    shift 2
    [ -e "coco-$name/samples.jsonl" ] ||
        $VUGEN sample --prompts "$PROMPTS" --sampler "$sampler" --out "coco-$name" "$@"
    $VUGEN score --fid --features "$FEATURES" --images "coco-$name" --reference data/coco --out "coco-$name.json"
    [ -n "$DPG_BENCH" ] || return 0
    [ -e "dpg-$name/samples.jsonl" ] ||
        $VUGEN sample --prompts "$DPG_BENCH/prompts" -n 4 --sampler "$sampler" --out "dpg-$name" "$@"
    $VUGEN score prompts --dpg-bench "$DPG_BENCH" --vlm "$JUDGE" --images "dpg-$name" --out "dpg-$name.json"
}

table vugen sampler.safetensors
table ldm sampler.safetensors --decoder ldm.safetensors
table baseline baseline-sampler.safetensors

# -----------------------------------------------------------------------------
# The figures: reconstructions from z and z̃, scores over training, the same prompts side by side, one prompt's seeds.

$VUGEN reconstruct --reducer reducer.safetensors --full identity.safetensors --images data/coco --count 5000
$VUGEN study training sampler.run baseline-sampler.run --features "$FEATURES" \
    --reference data/coco --out over-training.json
$VUGEN compare sampler.safetensors baseline-sampler.safetensors --prompt "A bear looking forward in a forest."
for name in sampler baseline-sampler; do
    $VUGEN sample "A bear looking forward in a forest." -n "$SEEDS" --sampler "$name.safetensors" --out "bears-$name"
    $VUGEN study diversity --features vlm --images "bears-$name" --out "bears-$name.json"
done

# And the VLM answers as before.
$VUGEN study understanding --sampler sampler.safetensors --images data/coco --out understanding.json
