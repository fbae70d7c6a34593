"""The standard FID network: Inception-v3 of 2015 as torch-fidelity carries it.

torch-fidelity's module includes TensorFlow's bilinear resize to 299x299 and the [-1, 1) scaling, so the
features are those of the original FID code. Only its constructor is not used as it stands: it unpickles
whatever file it is given and downloads without a limit in time.
"""

import hashlib
import io
import pickle
import queue
import threading
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import whole_file
from vugen_cli.metrics.features import Extractor
from vugen_cli.torchvision_repair import repair_torchvision

# torch-fidelity's release file; pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` is the same bytes.
WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_NAME}"
WEIGHTS_SHA256_PREFIX = "6726825d"
CONNECT_SECONDS = 8.0
SPATIAL_CHANNELS = 7  # of the 192 of mixed_6/conv, as ADM's evaluator takes them for sFID


def inception_extractor(weights: Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """The FID network, ready to take uint8 [B, 3, H, W] to all that the metrics want, in one pass.

    "features" [B, 2048], the last pool, of FID, KID and precision/recall (Heusel et al. 2017); "logits"
    [B, 1008] without the last layer's bias, of the Inception Score (Salimans et al. 2016); "spatial"
    [B, 2023], the first seven channels of mixed_6/conv at 17x17 places, row by row with the channel last,
    of sFID (Nash et al. 2021) as ADM's evaluator defines it.

    Args:
        weights: a PyTorch state dict of the network; None takes the standard file from torch's hub folder
            ($TORCH_HOME/hub/checkpoints), downloaded there if it is missing.
        device: where the network runs.

    Raises:
        VugenError: the weights cannot be found, fetched or read.
    """
    path = find_weights() if weights is None else Path(weights)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise VugenError(f"cannot read the Inception weights {path}: {error.strerror or error}.") from error
    sha256 = hashlib.sha256(data).hexdigest()
    network: Any = _fold_normalisation(_network(path, data)).to(device)
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu:
        # oneDNN's channels-last convolutions are 1.3 to 1.6 times as fast here; features agree to 1e-6.
        network = network.to(memory_format=torch.channels_last)
    spatial: list[torch.Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(
        lambda _module, _args, output: spatial.append(output[:, :SPATIAL_CHANNELS])
    )

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        pool, logits = network(images.to(device))
        channels_last = spatial.pop().permute(0, 2, 3, 1)
        return {"features": pool, "logits": logits, "spatial": channels_last.flatten(1)}

    standard = sha256.startswith(WEIGHTS_SHA256_PREFIX)
    return Extractor(
        name="inception",
        label="Inception-v3 (2015-12-05) pool, 2048",
        resize="TensorFlow 1 bilinear to 299x299 (torch-fidelity)",
        identity={"weights_sha256": sha256},
        features=features,
        warning=None
        if standard
        else (
            f"The Inception weights are not the standard file (sha256 {WEIGHTS_SHA256_PREFIX}...): "
            f"the value cannot be compared with FIDs published elsewhere."
        ),
        # On a CPU, batches whose activations stay in the caches are the fastest, and need little memory.
        batch_size=8 if on_cpu else 64,
    )


def find_weights() -> Path:
    """The standard weights in torch's hub folder, downloaded there if they are missing.

    Raises:
        VugenError: they are missing and cannot be fetched; within ten seconds if nothing answers.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(WEIGHTS_URL, path)
    except (OSError, ValueError) as error:  # URLError and every timeout are OSErrors
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise VugenError(
            f"the Inception weights are not at {path} and could not be downloaded ({reason}): "
            f"give --features inception:FILE, or score with --features vlm."
        ) from error
    return path


def _download(url: str, path: Path) -> None:
    """Fetch `url` to `path`, whole or not at all, checked against the hash in the standard file's name.

    Looking up a host name obeys no time limit, so the connection is made in a thread that may be left behind.
    """
    answers: queue.Queue[Any] = queue.Queue()

    def connect() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=CONNECT_SECONDS))
        except Exception as error:  # carried to the caller's thread, whatever it is
            answers.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        response = answers.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer in {CONNECT_SECONDS:.0f} s") from None
    if isinstance(response, Exception):
        raise response
    digest = hashlib.sha256()
    with whole_file(path) as temporary, response:
        with temporary.open("wb") as stream:
            while chunk := response.read(1 << 20):
                digest.update(chunk)
                stream.write(chunk)
        if not digest.hexdigest().startswith(WEIGHTS_SHA256_PREFIX):
            raise ValueError("the download is damaged: its hash is wrong")


def _network(path: Path, data: bytes) -> torch.nn.Module:
    """torch-fidelity's module with the state dict in `data`; its constructor unpickles only our own copy."""
    repair_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        trusted = io.BytesIO()
        torch.save({str(name): torch.as_tensor(tensor) for name, tensor in state.items()}, trusted)
        trusted.seek(0)
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=trusted
        )
    # torch.load and load_state_dict raise a dozen kinds on a file that is something else.
    except Exception as error:
        wrong = isinstance(error, pickle.UnpicklingError)  # whose message advises to load it all the same
        reason = "it is no file of tensors" if wrong else first_line(error)
        raise VugenError(
            f"{path} holds no weights of the FID Inception network ({reason}): "
            f"give the file {WEIGHTS_NAME} of torch-fidelity."
        ) from error


def _fold_normalisation(network: torch.nn.Module) -> torch.nn.Module:
    """Multiply every batch normalisation into the convolution before it: a third less time on a CPU."""
    from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d

    for module in network.modules():
        if isinstance(module, BasicConv2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = torch.nn.Identity()
    return network.requires_grad_(False)
