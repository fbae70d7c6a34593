"""Export, push and draw from the hub: the same bytes in a fresh process, and clear lines where it fails."""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from conftest import vugen_here
from huggingface_hub import constants

from vugen_cli import hub
from vugen_cli.card import AdapterCard, BaseCard
from vugen_cli.checkpoint import fingerprint, load_checkpoint, save_checkpoint, select
from vugen_cli.errors import VugenError
from vugen_cli.recipe import load_recipe
from vugen_cli.sampling import pipeline
from vugen_cli.sampling.export import export
from vugen_cli.sampling.sampler import Sampler
from vugen_cli.vlm.configured import configured_vlm
from vugen_cli.vlm.frozen import load_vlm

PROMPTS = ["a bear in a forest", "two apples in the snow"]
FRESH = """
import sys
from vugen_cli import VugenPipeline
VugenPipeline  # torchvision is mended before diffusers is imported
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert pipe.sampler.vlm.name == sys.argv[1] + "/vlm" and isinstance(pipe, VugenPipeline)
same = VugenPipeline.from_pretrained(sys.argv[1])
for number, each in enumerate((pipe, same)):
    for i, image in enumerate(each(sys.argv[2:], seed=3).images):
        image.save(f"{number}-{i}.png")
"""


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny sampler as a folder, with pictures and scores."""
    folder = tmp_path_factory.mktemp("exported")
    report = {"features": "VLM features", "images": {"path": "s", "count": 8, "bad": []}}
    score = {"metric": "frechet_vlm", "name": "Fréchet distance", "value": 48.25, "interval": [38.9, 57.8]}
    (folder / "score.json").write_text(json.dumps({**report, "scores": [score]}))
    words = ["export", trained / "sampler.safetensors", "--out", "bears", "--scores", "score.json"]
    words += ["--licence", "cc-by-sa-4.0", *(w for p in PROMPTS for w in ("--prompt", p))]
    result = vugen_here(*words, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "bears"


def pictures(sampler: str | Path, cwd: Path) -> dict[str, bytes]:
    from PIL import Image

    result = vugen_here("sample", *PROMPTS, "--seed", "3", "--sampler", sampler, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return {p.name[:6]: Image.open(p).tobytes() for p in sorted((cwd / "samples").glob("*-0000.png"))}


def test_a_fresh_process_elsewhere_draws_the_same_bytes(
    exported: Path, trained: Path, tmp_path: Path
) -> None:
    from PIL import Image

    wanted = list(pictures(trained / "sampler.safetensors", tmp_path).values())
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(exported, elsewhere / "e")
    words = [sys.executable, "-c", FRESH, str(elsewhere / "e"), *PROMPTS]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}  # diffusers copies pipeline.py there
    subprocess.run(words, cwd=elsewhere, check=True, capture_output=True, env=environment)
    for number in range(2):
        assert [Image.open(elsewhere / f"{number}-{i}.png").tobytes() for i in range(2)] == wanted


def test_the_model_card_says_what_is_known(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    assert (
        text.startswith("---\n")
        and "license: cc-by-sa-4.0\n" in text
        and "pipeline_tag: text-to-image" in text
    )
    for fact in (
        "openmoji, 96 pictures",
        "CC BY-SA 4.0 (OpenMoji",
        "2 steps of euler",
        "![a bear in a forest;",
    ):
        assert fact in text
    assert "| Fréchet distance | 48.25 (38.9 to 57.8) | 8 | VLM features |" in text
    assert (exported / "pictures.png").is_file()


def test_the_comfyui_node_of_the_docs_draws(exported: Path) -> None:
    page = Path(hub.__file__).parent.parent / "docs/sharing.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    node = names["NODE_CLASS_MAPPINGS"]["Vugen"]
    given = {key: options[1].get("default") for key, options in node.INPUT_TYPES()["required"].items()}
    (drawn,) = node().draw(**{**given, "folder": str(exported), "prompt": PROMPTS[0], "steps": 1, "count": 2})
    assert drawn.shape == (2, 64, 64, 3) and drawn.dtype == torch.float32


def test_what_holds_no_scores_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{}]")
    result = vugen_here("export", trained / "sampler.safetensors", "--scores", "no.json", cwd=tmp_path)
    assert result.returncode == 1 and "no.json is no JSON of `vugen score`" in result.stderr
    assert not (tmp_path / "exported").exists()


def test_a_prompt_that_cannot_be_drawn_is_refused_before_anything_is_written(
    trained: Path, tmp_path: Path
) -> None:
    long = ("--prompt", "a bear " * 400)
    result = vugen_here("export", trained / "sampler.safetensors", *long, "--out", "it", cwd=tmp_path)
    assert result.returncode == 1 and "is too long" in result.stderr and not (tmp_path / "it").exists()
    blank = ("--prompt", " ", "--out", "it")
    result = vugen_here("export", trained / "sampler.safetensors", *blank, cwd=tmp_path)
    assert result.returncode == 1 and "--prompt is empty" in result.stderr and not (tmp_path / "it").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as pushing and downloading ask for, of one revision a repository."""

    repositories: dict[str, dict[str, bytes]]
    blobs: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == [""]:
            return self.answer(b"")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name not in self.repositories or (
            parts[4:5] == ["revision"] and parts[5] not in ("main", "v1", SHA)
        ):
            code = "RepoNotFound" if name not in self.repositories else "RevisionNotFound"
            return self.answer(b"", 404, {"X-Error-Code": code})
        files = self.repositories[name]
        if parts[0] != "api":
            data = files["/".join(parts[4:])]
            return self.answer(data, 200, {"ETag": f'"{digest(data)}"', "X-Repo-Commit": SHA})
        if parts[4:5] == ["tree"]:
            listed = [{"type": "file", "path": p, "size": len(d), "oid": digest(d)} for p, d in files.items()]
            return self.answer(json.dumps(listed).encode())
        return self.answer(json.dumps({"id": name, "sha": SHA, "siblings": []}).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != "Bearer secret":
            return self.answer(b"", 401)
        parts = self.path.partition("?")[0].strip("/").split("/")
        name, url = "/".join(parts[2:4]), f"http://{self.headers['Host']}"
        said: dict[str, object] = {}
        if parts[-1] == "create":
            said = {"url": f"{url}/{json.loads(body)['organization']}/{json.loads(body)['name']}"}
        elif "preupload" in parts:
            modes = [(f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular")
                     for f in json.loads(body)["files"]]  # fmt: skip
            said = {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]}
        elif parts[-1] == "batch":
            objects = json.loads(body)["objects"]
            said = {"objects": [o | {"actions": {"upload": {"href": f"{url}/{o['oid']}"}}} for o in objects]}
        elif "commit" in parts:
            for line in body.splitlines():
                value = json.loads(line)["value"]
                if "path" in value:
                    data = (
                        base64.b64decode(value["content"]) if "content" in value else self.blobs[value["oid"]]
                    )
                    self.repositories.setdefault(name, {})[value["path"]] = data
            said = {"commitUrl": f"{url}/{name}/commit/{SHA}", "commitOid": SHA}
        self.answer(json.dumps(said).encode())

    def do_PUT(self) -> None:
        self.blobs[self.path.strip("/")] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b"")

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


SHA = "0123456789" * 4


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def test_nothing_of_the_users_own_is_written_over(lively_sampler: Sampler, tmp_path: Path) -> None:
    for name in ("sampler.safetensors", "pipeline.py"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("my own")
        (folder / "pictures.png").write_text("my own")
        with pytest.raises(VugenError, match=name):
            export(lively_sampler, folder, [], [], "mit")
        assert {path.read_text() for path in folder.iterdir()} == {"my own"}
    (folder / "pipeline.py").unlink()
    with pytest.raises(VugenError, match="pictures.png"):
        export(lively_sampler, folder, ["a bear"], [], "mit")
    with pytest.raises(VugenError, match="{image}"):
        export(lively_sampler, tmp_path / "new", ["{image} in the snow"], [], "mit")
    assert not (tmp_path / "new").exists()
    for name in ("model_index.json", "sampler/pipeline.py"):  # of another pipeline
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("my own")
        with pytest.raises(VugenError, match="is there already"):
            export(lively_sampler, folder, [], [], "mit")
        (folder / name).unlink()
    export(lively_sampler, folder, [], [], "mit")
    assert (folder / "pictures.png").read_text() == "my own"


def test_nothing_of_an_earlier_export_stays_and_half_of_one_does_not_look_whole(
    lively_sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, licence = tmp_path / "bears", "mit"
    export(lively_sampler, out, [], [], licence)
    stale = [out / "vlm" / "chat_template.jinja.old", out / "pictures.png"]
    for path in stale:
        path.write_text("of another model")
    index, written = out / "model_index.json", (out / "vlm/config.json").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "save_sampler", killed)
        with pytest.raises(KeyboardInterrupt):
            export(lively_sampler, out, [], [], licence)
    assert not index.exists()
    export(lively_sampler, out, [], [], licence)
    assert index.is_file() and not any(path.exists() for path in stale)
    assert (out / "vlm/config.json").read_bytes() == written
    modes = {path.stat().st_mode for path in out.rglob("*") if path.is_file()}
    assert len(modes) == 1, "weights can be read by whom configs can"

    (tmp_path / "vlm").mkdir()
    (tmp_path / "vlm/config.json").write_text("my own")
    with pytest.raises(VugenError, match="is there already"):
        export(lively_sampler, tmp_path, [], [], licence)
    assert (tmp_path / "vlm/config.json").read_text() == "my own"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A hub of our own; the library is pointed to it, with an empty cache."""
    handler = type("OneHub", (Hub,), {"repositories": {}, "blobs": {}})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    here = (
        f"http://127.0.0.1:{running.server_port}"  # what the library makes of HF_ENDPOINT as it is imported:
    )
    monkeypatch.setattr(constants, "ENDPOINT", here)
    files = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.downloaded.cache_clear()
    yield running
    running.shutdown()
    running.server_close()


def test_what_is_pushed_is_drawn_with_from_the_hub_and_then_without_it(
    exported: Path, trained: Path, tmp_path: Path, server: ThreadingHTTPServer
) -> None:
    (mine := exported / "mine.txt").write_text("of the user, who exported into a folder of theirs")
    would = vugen_here("push", exported, "me/bears", "--dry-run", cwd=tmp_path).stdout
    mine.unlink()
    assert "mine.txt" not in would and "vlm/config.json" in would and "README.md" in would
    assert "give user/name" in vugen_here("push", exported, "bears", "--dry-run", cwd=tmp_path).stderr
    repositories = server.RequestHandlerClass.repositories  # type: ignore[attr-defined]
    assert "sampler.safetensors" in would and "would go to me/bears" in would and not repositories
    result = vugen_here("push", exported, "me/bears", cwd=tmp_path)
    assert result.returncode == 0 and "--sampler hf:me/bears" in result.stdout, result.stderr
    files = {p.relative_to(exported).as_posix(): p.read_bytes() for p in exported.rglob("*") if p.is_file()}
    assert repositories["me/bears"] == files
    wanted = pictures(trained / "sampler.safetensors", tmp_path)
    assert pictures("hf:me/bears@v1", tmp_path) == wanted
    copy = hub.downloaded("hf:me/bears@v1", "--sampler")
    assert not list(copy.rglob("*.py")), "no code comes with it"
    server.shutdown()
    server.server_close()
    hub.downloaded.cache_clear()
    assert pictures("hf:me/bears@v1", tmp_path) == wanted
    with pytest.raises(VugenError, match=r"the VLM hf:me/other was not downloaded before and the hub cannot"):
        load_vlm("hf:me/other")


def test_a_vlm_is_had_from_the_hub(vlm_path: Path, server: ThreadingHTTPServer) -> None:
    files = {path.name: path.read_bytes() for path in vlm_path.iterdir()}
    server.RequestHandlerClass.repositories["me/vlm"] = files  # type: ignore[attr-defined]
    assert load_vlm("hf:me/vlm").fingerprint == load_vlm(str(vlm_path)).fingerprint


def test_a_vlm_on_the_hub_is_planned_with_by_its_configs_alone(
    vlm_path: Path, server: ThreadingHTTPServer
) -> None:
    files = {path.name: path.read_bytes() for path in vlm_path.iterdir()}
    server.RequestHandlerClass.repositories["me/vlm"] = files  # type: ignore[attr-defined]
    recipe = load_recipe(None, ["vlm=hf:me/vlm@v1"])
    planned = configured_vlm(recipe.vlm, recipe)
    sizes = {name: weight.shape for name, weight in load_vlm(str(vlm_path)).model.named_parameters()}
    assert {name: weight.shape for name, weight in planned.model.named_parameters()} == sizes
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    with pytest.raises(VugenError, match="the VLM hf:me/none cannot be had from the hub"):
        configured_vlm("hf:me/none", recipe)


def test_an_adapter_is_merged_into_a_sampler_of_the_hub(
    exported: Path, trained: Path, tmp_path: Path, server: ThreadingHTTPServer
) -> None:
    files = {p.relative_to(exported).as_posix(): p.read_bytes() for p in exported.rglob("*") if p.is_file()}
    server.RequestHandlerClass.repositories["me/bears"] = files  # type: ignore[attr-defined]
    tensors, card = load_checkpoint(trained / "sampler.safetensors")
    matrix = next(name for name in tensors if name.endswith("q_proj.weight")).removesuffix(".weight")
    rows, columns = tensors[f"{matrix}.weight"].shape
    adapter = {
        f"{matrix}.lora_A.weight": torch.ones(1, columns),
        f"{matrix}.lora_B.weight": torch.ones(rows, 1),
    }
    base = BaseCard(name="bears", fingerprint=fingerprint(select(tensors, "expert"), "expert."))
    facts = AdapterCard(step=1, rank=1, base=base, recipe={}, data=card.data)
    save_checkpoint(tmp_path / "mine.safetensors", adapter, facts)
    words = ["merge", "hf:me/bears@v1", "--adapter", "mine.safetensors:0.5", "--out", "m.safetensors"]
    done = vugen_here(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    merged, facts_of = load_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(merged[f"{matrix}.weight"], tensors[f"{matrix}.weight"] + 0.5)
    assert facts_of.vlm.fingerprint == load_vlm(facts_of.vlm.name).fingerprint  # as it was downloaded


def test_what_the_hub_does_not_give_is_one_line(
    exported: Path, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(VugenError, match="--sampler hf:me/none cannot be had from the hub"):
        hub.downloaded("hf:me/none", "--sampler")
    with pytest.raises(VugenError, match="is written hf:owner/name"):
        hub.downloaded("hf:bears", "--sampler")
    with pytest.raises(VugenError, match="no model_index.json"):
        hub.push(tmp_path, "me/bears")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(VugenError, match=r"me/bears was not pushed: .*logged in"):
        hub.push(exported, "me/bears")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(VugenError, match="the hub cannot be reached .* push it later"):
        hub.push(exported, "me/bears")


def test_a_mirror_that_answers_nothing_at_its_root_can_be_asked(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for status, problem in ((401, False), (403, False), (404, False), (405, False), (503, True)):
        answer = partialmethod(Hub.answer, b"", status)
        monkeypatch.setattr(server.RequestHandlerClass, "do_HEAD", answer)
        assert bool(hub.hub_problem()) is problem


def test_errors_of_the_hubs_library_and_of_its_client_are_one_line(
    exported: Path, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VugenError, match=r"--sampler hf:a--b/c cannot be had from the hub: .*a--b/c"):
        hub.downloaded("hf:a--b/c", "--sampler")
    with pytest.raises(VugenError, match=r"the VLM a--b/c: .*a--b/c"):
        hub.reach_hub("a--b/c", "the VLM")

    def times_out(*_: object, **__: object) -> None:
        raise httpx2.ReadTimeout("The read operation timed out")

    monkeypatch.setattr("huggingface_hub.snapshot_download", times_out)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", times_out)
    with pytest.raises(VugenError, match="cannot be had from the hub: The read operation timed out"):
        hub.downloaded("hf:me/bears", "--sampler")
    with pytest.raises(VugenError, match="me/bears was not pushed: The read operation timed out"):
        hub.push(exported, "me/bears")
    monkeypatch.setattr(constants, "ENDPOINT", "no-address")
    assert "no-address" in hub.hub_problem()


def test_a_path_is_no_name_on_the_hub() -> None:
    names = ("owner/name", "./vae", "../vae", "/vae", "~/vae", "nano", "a/b/c")
    assert [name for name in names if hub.may_be_id(name)] == ["owner/name"]


def test_a_hub_that_does_not_answer_is_said_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never says a word
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.perf_counter()
        assert hub.hub_problem(seconds=0.2)
    assert time.perf_counter() - started < 5
