"""Fetching from a server of our own that resumes, cuts, ignores and lies."""

import fcntl
import hashlib
import http.server
import json
import resource
import shutil
import threading
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file

from sda_fast.download import download, fetch
from sda_fast.errors import SdaError
from sda_fast.models import load_classifier
from sda_fast.models.presets import ADM_PRESETS, DIT_PRESETS
from sda_fast.published import PUBLISHED, Published, RemoteFile

CONTENT = bytes(range(256)) * 12_000  # three pieces of a download
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` by the rules of `server.behaviour`."""

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        if self.path != "/weights.pt":
            return self.send_error(404)
        start, wanted = 0, self.headers["Range"]
        same = self.headers["If-Range"] in (None, server.etag)
        if wanted and same and not server.ignores_range:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.content)}")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.says_length:
            self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start : start + server.cuts_after])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.etag, server.requests = CONTENT, '"one"', []
        server.ignores_range, server.says_length, server.cuts_after = False, True, SIZE
        server.handle_error = lambda request, address: None  # a client that has enough
        server.url = f"http://127.0.0.1:{server.server_port}/weights.pt"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def file(server):
    return RemoteFile(server.url, SIZE, f"sha256:{SHA256}")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_file_and_its_progress(server, file, tmp_path):
    reports = []
    target = download(file, tmp_path / "new" / "weights.pt", lambda *report: reports.append(report))
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == ["weights.pt"]
    assert reports[0] == ("weights.pt", 0, SIZE)
    assert reports[-1] == ("weights.pt", SIZE, SIZE)
    assert len(reports) >= 3
    assert "Range" not in server.requests[0]
    download(file, target)  # is there already
    assert len(server.requests) == 1


@pytest.fixture
def cut(server, file, tmp_path):
    """The target of a download that was cut in its middle."""
    server.cuts_after = SIZE // 2
    with pytest.raises(SdaError, match=rf"cut after {SIZE // 2} of {SIZE} bytes of {server.url}: the same command"):
        download(file, tmp_path / "weights.pt")
    assert names(tmp_path) == ["weights.pt.part", "weights.pt.part.version"]
    server.cuts_after = SIZE
    return tmp_path / "weights.pt"


def test_a_cut_connection_is_gone_on_with(server, file, cut):
    reports = []
    assert download(file, cut, lambda *report: reports.append(report)).read_bytes() == CONTENT
    assert server.requests[-1]["Range"] == f"bytes={SIZE // 2}-"
    assert reports[0] == ("weights.pt", SIZE // 2, SIZE)
    assert names(cut.parent) == ["weights.pt"]


def test_another_version_of_the_file_is_fetched_from_its_start(server, cut):
    server.content, server.etag = CONTENT[::-1], '"two"'
    assert download(RemoteFile(server.url), cut).read_bytes() == CONTENT[::-1]


def test_a_server_that_ignores_the_range(server, file, cut):
    server.ignores_range = True
    assert download(file, cut).read_bytes() == CONTENT


def test_a_server_that_names_neither_version_nor_length(server, file, tmp_path):
    server.etag, server.says_length, server.cuts_after = None, False, 1000
    with pytest.raises(SdaError, match=f"cut after 1000 of {SIZE} bytes"):
        download(file, tmp_path / "weights.pt")
    server.cuts_after = SIZE
    assert download(file, tmp_path / "weights.pt").read_bytes() == CONTENT
    assert "If-Range" not in server.requests[-1]
    assert server.requests[-1]["Range"] == "bytes=1000-"


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("surplus", [0, 1])
def test_a_part_that_was_already_whole_or_longer(server, file, tmp_path, known, surplus):
    (tmp_path / "weights.pt.part").write_bytes(CONTENT + b"x" * surplus)
    assert download(file if known else RemoteFile(server.url), tmp_path / "weights.pt").read_bytes() == CONTENT
    assert names(tmp_path) == ["weights.pt"]


@pytest.mark.parametrize("checksum", [f"sha256:{SHA256[:8]}", f"md5:{hashlib.md5(CONTENT).hexdigest()}"])
def test_other_checksums(server, tmp_path, checksum):
    assert download(RemoteFile(server.url, None, checksum), tmp_path / "weights.pt").exists()


@pytest.mark.parametrize("checksum", ["sha256:00000000", "md5:" + "0" * 32])
def test_a_wrong_checksum_leaves_nothing(server, tmp_path, checksum):
    wrong = RemoteFile(server.url, SIZE, checksum)
    kind, _, digits = checksum.partition(":")
    found = hashlib.new(kind, CONTENT).hexdigest()[: len(digits)]
    with pytest.raises(SdaError, match=rf"is not the published file \({kind} {found} instead of {digits}\)"):
        download(wrong, tmp_path / "weights.pt")
    assert names(tmp_path) == []


def test_a_wrong_size_is_seen_before_the_download(server, tmp_path):
    with pytest.raises(SdaError, match=f"has {SIZE} bytes instead of 7: its publisher has changed it"):
        download(RemoteFile(server.url, 7), tmp_path / "weights.pt")
    assert not (tmp_path / "weights.pt").exists()


def test_a_file_that_is_another_is_not_touched(server, file, tmp_path):
    target = tmp_path / "weights.pt"
    for content in (b"mine", CONTENT[::-1]):
        target.write_bytes(content)
        with pytest.raises(SdaError, match=r"weights\.pt exists and is not the published file \(.* instead of"):
            download(file, target)
        assert target.read_bytes() == content
    assert server.requests == []


def test_servers_that_do_not_answer(server, tmp_path):
    with pytest.raises(SdaError, match=r"other\.pt cannot be fetched \(404 Not Found\)"):
        download(RemoteFile(server.url.replace("weights", "other")), tmp_path / "weights.pt")
    server.server_close()
    server.socket.close()
    with pytest.raises(SdaError, match=r"cannot be reached \(.*\): check the network"):
        download(RemoteFile("http://127.0.0.1:1/weights.pt"), tmp_path / "weights.pt")


def test_no_room_is_seen_before_the_download(server, file, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=SIZE - 1))
    with pytest.raises(SdaError, match=f"has {SIZE - 1} bytes left, weights.pt needs {SIZE}: make room"):
        download(file, tmp_path / "weights.pt")


def test_a_disk_that_fills_up_keeps_what_is_there(server, file, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))  # writing beyond fails like a full disk
    try:
        with pytest.raises(SdaError, match=r"weights\.pt cannot be written \(File too large\): make room"):
            download(file, tmp_path / "weights.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = (tmp_path / "weights.pt.part").stat().st_size
    assert 0 < kept <= SIZE // 2
    assert download(file, tmp_path / "weights.pt").read_bytes() == CONTENT
    assert server.requests[-1]["Range"] == f"bytes={kept}-"


def test_folders_that_cannot_be_written(file, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(SdaError, match="cannot be written"):
        download(file, tmp_path / "taken" / "weights.pt")


def test_two_processes_do_not_mix(server, file, tmp_path):
    with open(tmp_path / "weights.pt.part", "ab") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        with pytest.raises(SdaError, match=r"another process is fetching .*weights\.pt: wait"):
            download(file, tmp_path / "weights.pt")
    assert server.requests == []


@pytest.fixture
def known(server, file, monkeypatch):
    """Two checkpoints in the list: `one` of one file, `two` of two."""
    monkeypatch.setitem(PUBLISHED, "one", Published("one", "an ADM", "--adm FILE", "MIT", (file,)))
    monkeypatch.setitem(PUBLISHED, "two", Published("two", "a VAE", "--vae FOLDER", "MIT", (file, file)))


def test_checkpoints_of_one_and_of_several_files(known, tmp_path):
    assert fetch("one", tmp_path) == tmp_path / "weights.pt"
    assert fetch("two", tmp_path) == tmp_path / "two"
    assert (tmp_path / "two" / "weights.pt").read_bytes() == CONTENT
    with pytest.raises(SdaError, match=r"no checkpoint is known as '256x256_diffusion_unc'; known are 256x256_diff"):
        fetch("256x256_diffusion_unc", tmp_path)


def test_the_list_is_sound():
    for name, checkpoint in PUBLISHED.items():
        assert checkpoint.name == name
        assert checkpoint.holds
        assert checkpoint.terms
        assert checkpoint.files
        for file in checkpoint.files:
            assert file.url.startswith("https://")
            assert "/" not in file.name
            if file.checksum is not None:
                kind, _, digits = file.checksum.partition(":")
                int(digits, 16)
                assert len(digits) in {"sha256": (8, 64), "md5": (32,)}[kind]
            if "openmmlab" in file.url:  # its names carry the digits
                assert file.name.endswith(f"-{file.checksum.removeprefix('sha256:')[:8]}.pth")
    presets = {word for c in PUBLISHED.values() for word in c.option.split() if "imagenet" in word or "dit-" in word}
    assert presets == {*ADM_PRESETS, "dit-xl-2", "dit-xl-2-512"}
    assert presets <= {*ADM_PRESETS, *DIT_PRESETS}


def test_command_lists(cli):
    said = cli("checkpoints")
    assert (said.code, said.err) == (0, "")
    for name, checkpoint in PUBLISHED.items():
        line = f"{name}: {checkpoint.holds} ({checkpoint.terms}); {checkpoint.option}"
        assert f"{line}\n    {checkpoint.files[0].url}\n" in said.out
    assert "2,211,383,297 bytes, md5:fd9dd2335b8736d521de0aed54bd90ca" in said.out
    rows = json.loads(cli("checkpoints", "--json").out)["checkpoints"]
    assert [row["name"] for row in rows] == list(PUBLISHED)
    assert rows[0]["files"][0]["size"] == 1_183_736_577


def test_command_fetches(cli, known, tmp_path):
    said = cli("checkpoints", "--fetch", "one", "--output", tmp_path / "a")
    assert (said.code, said.out, said.err) == (0, f"{tmp_path / 'a' / 'weights.pt'}\n", "")
    said = cli("checkpoints", "--fetch", "one", "--output", tmp_path / "a", "--json")
    assert json.loads(said.out) == {"path": str(tmp_path / "a" / "weights.pt")}
    said = cli("checkpoints", "--fetch", "three", "--output", tmp_path)
    assert said.code == 2
    assert "no checkpoint is known as 'three'" in said.err


def test_command_converts(cli, tmp_path):
    model = timm.create_model("resnet18", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    options = ("--architecture", "resnet18", "--classes", tmp_path / "classes.txt", "--output", tmp_path / "out")
    said = cli("checkpoints", "--convert", tmp_path / "mine.pth", *options)
    assert (said.code, said.out) == (0, f"{tmp_path / 'out' / 'mine.safetensors'}\n")
    classifier = load_classifier(tmp_path / "out" / "mine.safetensors")
    assert (classifier.classes, classifier.resize) == (("ant", "bee"), 256)
    assert torch.equal(load_file(tmp_path / "out" / "mine.safetensors")["model.fc.weight"], model.fc.weight)
    said = cli("checkpoints", "--convert", tmp_path / "mine.pth", *options, "--mean", "0.5,0.5, .4", "--std", "1,1,0.5")
    assert said.code == 0, said.err
    classifier = load_classifier(tmp_path / "out" / "mine.safetensors")
    assert torch.equal(classifier.mean.flatten(), torch.tensor([0.5, 0.5, 0.4]))
    assert torch.equal(classifier.std.flatten(), torch.tensor([1.0, 1.0, 0.5]))
    for wrong in ("0.5", "0.5,0.5,x", "0.5 0.5 0.5"):
        said = cli("checkpoints", "--convert", tmp_path / "mine.pth", *options, "--mean", wrong)
        assert said.code == 2
        assert f"--mean '{wrong}' is not three numbers with commas between them, such as 0.5,0.5,0.5" in said.err


def test_command_saves_timms_weights(cli, tmp_path, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    said = cli("checkpoints", "--fetch", "timm:resnet18.a1_in1k", "--output", tmp_path)
    assert (said.code, said.out) == (0, f"{tmp_path / 'resnet18.a1_in1k.safetensors'}\n")
    classifier = load_classifier(tmp_path / "resnet18.a1_in1k.safetensors")
    assert (len(classifier.classes), classifier.input_size, classifier.resize) == (1000, 224, 235)  # crop 0.95


def test_timm_weights_without_a_network(cli, tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise OSError("We couldn't connect to huggingface.co")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(SdaError, match=r"timm's weights of resnet18 cannot be had \(We couldn't connect .*network, or"):
        load_classifier("timm:resnet18")
    with pytest.raises(SdaError, match="timm has no model named 'resnet19'; close names: resnet18"):
        load_classifier("timm:resnet19")
    said = cli("evaluate", "--input", tmp_path, "--output", tmp_path, "--model", "timm:resnet18")
    assert said.code == 2
    assert "timm:resnet18 is no file yet: sda-fast checkpoints --fetch timm:resnet18 --output FOLDER" in said.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--fetch", "one"), "--output is missing"),
        (("--convert", "a.pth"), "--output is missing"),
        (("--fetch", "one", "--convert", "a.pth"), "--fetch and --convert are two commands"),
        (("--architecture", "resnet18"), "describe the file of --convert"),
        (("--std", "1,1,1"), "describe the file of --convert"),
        (("--convert", "a.pth", "--output", "out"), "checkpoint a.pth does not exist"),
    ],
)
def test_wrong_use(cli, options, sentence):
    said = cli("checkpoints", *options)
    assert said.code == 2
    assert sentence in said.err
