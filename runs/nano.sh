#!/bin/sh
# The bundled model from nothing: the scenes, the small VLM, the latent space and its decoder, the sampler, the judges.
# About twenty hours on two CPU cores; the numbers are in recipes/nano.yaml and below.
#
#     sh runs/nano.sh             # everything, into out/nano
#     VLM=nano sh runs/nano.sh    # with the VLM that ships
#
# Stopped, the same line goes on where it was: what is finished is not made again.
set -eu
OUT=${OUT:-out/nano}       # everything is written here
COUNT=${COUNT:-40000}      # scenes to train on, in each set
HELD_OUT=${HELD_OUT:-2000} # scenes to compare with
JUDGED=${JUDGED:-620}      # pictures of each kind that are judged at the end
EXTRA=${EXTRA:-}           # added to every training command, as in EXTRA="--steps 100 --batch-size 16"
mkdir -p "$OUT"
cd "$OUT"

# train STAGE OUT OPTIONS...: nothing if OUT is there; a training that was stopped goes on by itself.
train() {
    stage=$1 made=$2
    shift 2
    [ -e "$made" ] || vugen "train-$stage" "$@" --out "$made" $EXTRA
}

# -----------------------------------------------------------------------------
# Scenes. Two subjects in one scene take the most training, then two or three of one: there is a set rich in both.
# And edits of scenes.

vugen prepare --dataset openmoji --count "$COUNT"
vugen prepare --dataset openmoji --count "$HELD_OUT" --split val
vugen prepare --dataset openmoji --count "$COUNT" --size 128 --out data/openmoji-128
vugen prepare --dataset openmoji --count "$COUNT" --pairs 0.7 --counts 0.2 --seed 1 --out data/pairs
vugen prepare --dataset openmoji-edits --count "$COUNT"
vugen prepare --dataset openmoji-edits --count "$HELD_OUT" --split val

# -----------------------------------------------------------------------------
# The VLM. First its vision side alone, which then stays as it is: what it keeps of the pixels is what can be drawn.
# Then the language side, on two subjects first, which need the most, and on the standard set at the end.

if [ -z "${VLM:-}" ]; then
    train vlm vlm-1 --data data/openmoji --steps 2600
    train vlm vlm-2 --data data/pairs --init vlm-1 --steps 1200 --batch-size 32
    train vlm vlm --data data/openmoji --init vlm-2 --steps 500 --batch-size 32 --set train_vlm.lr=8e-4
    VLM=vlm
fi

# -----------------------------------------------------------------------------
# Stage 1: z to z̃ of 24 channels, with a decoder. Then z̃ of every scene, once: the sampler needs no encoder.

train reducer reducer.safetensors --data data/openmoji --vlm "$VLM" --set decoder.losses.gradient=0.1
vugen prepare --latents reducer.safetensors --data data/openmoji --out latents
vugen prepare --latents reducer.safetensors --data data/pairs --out latents-pairs
vugen prepare --latents reducer.safetensors --data data/openmoji-edits --out latents-edits

# -----------------------------------------------------------------------------
# Stage 2: the velocity field in z̃, of texts and of edits, whose pictures the expert reads as z̃. Between its two parts
# a short one, of two subjects at times near the noise: who stands on the left, which nothing teaches by the way.

SCENES="{path: latents, weight: 0.2}, {path: latents-pairs, weight: 0.45}, {path: latents-edits, weight: 0.35}"
train sampler sampler-1.safetensors --reducer reducer.safetensors --steps 60000 --set "data.mixture=[$SCENES]" \
    --set expert.adaptive_norms=true --set expert.reference=only --set train_sampler.cooldown=0.9
train sampler sampler-2.safetensors --init sampler-1.safetensors --data latents-pairs --steps 400 --batch-size 128 \
    --set flow.shift=6 --set train_sampler.opposites=2 --set train_sampler.ema=0.98 --set train_sampler.cooldown=0.2
train sampler sampler.safetensors --init sampler-2.safetensors --steps 35000 --set "data.mixture=[$SCENES]" \
    --set flow.shift=1 --set train_sampler.opposites=1 --set train_sampler.ema=0.999 --set train_sampler.cooldown=0.9

# -----------------------------------------------------------------------------
# The decoder, further; then its outer layers with less of the gradient's loss, which makes flat areas even and lines
# soft, since what is left of grain is smoothed. And outer layers that paint the same latents at 128 px: patches are
# twice as large, all else is the other's. On a second machine this can run beside stage 2.

train reducer decoder.safetensors --reducer reducer.safetensors --steps 7800 --batch-size 64 \
    --set decoder.losses.gradient=2 --set decoder.shift=8
OUTER="--steps 1200 --batch-size 64 --set decoder.trained=outer --set decoder.losses.gradient=0.3 --set decoder.shift=8"
OUTER="$OUTER --set train_reducer.optimizer=adamw --set train_reducer.lr=1e-3 --set train_reducer.cooldown=1"
train reducer decoder-64.safetensors --reducer decoder.safetensors $OUTER --set decoder.smoothing=4
train reducer decoder-128.safetensors --reducer decoder.safetensors --data data/openmoji-128 $OUTER \
    --set decoder.patch=8 --set decoder.smoothing=6

# -----------------------------------------------------------------------------
# The judges: scenes of their own, that nothing else learns from; the lenient one looks at reconstructions too.

vugen prepare --dataset openmoji --count "$COUNT" --pairs 0.4 --seed 2 --out data/judged
vugen prepare --dataset openmoji --count "$HELD_OUT" --split val --pairs 0.4 --seed 2 --out data/judged
train judge strict.safetensors --data data/judged
train judge lenient.safetensors --data data/judged --init strict.safetensors --reducer decoder-64.safetensors \
    --steps 500 --set train_judge.lr=1e-3 --set train_judge.cooldown=0.7

# -----------------------------------------------------------------------------
# Look at it, and measure it. benchmarks/make_bundle.py puts these files into the package.

vugen sample "a bear in a forest" "two apples next to a tree" -n 4 --sampler sampler.safetensors \
    --decoder decoder-128.safetensors
[ -e composition.json ] || vugen study composition --sampler sampler.safetensors --count "$JUDGED"
[ -e edits.json ] || vugen study edits --sampler sampler.safetensors --count "$JUDGED"
vugen reconstruct --reducer decoder-64.safetensors --images data/openmoji --count 500
