"""Dictionaries go to a hub, and come back the same."""

import json

import pytest
import torch
import yaml
from hub import WRITER, serve, using
from safetensors.torch import load_file
from tiny import random_sae

from saepatch.cli.main import main
from saepatch.dictionaries import publish as hub
from saepatch.dictionaries.loading import load_sae
from saepatch.errors import UserError

pytestmark = pytest.mark.whole

SITES = ("resid_post.1", "mlp_out.2")
HOOKS = {"resid_post.1": "blocks.1.hook_resid_post", "mlp_out.2": "blocks.2.hook_mlp_out"}


def save(folder, site, seed=0, architecture="topk", **metadata):
    import sae_lens

    sae = random_sae(architecture, seed=seed)
    about = {"sae_lens_version": sae_lens.__version__, "hook_name": HOOKS[site], "model_name": "acme/tiny"} | metadata
    for name, value in about.items():
        setattr(sae.cfg.metadata, name, value)
    sae.save_model(folder)
    figures = {"fvu": 0.1234567, "l0": 6.0, "tokens": 4096, "kl": 0.5, "ce_model": 3.0}
    (folder / "metrics.json").write_text(json.dumps(figures))


@pytest.fixture
def trained(tmp_path):
    """What training leaves, and what must stay at home."""
    out = tmp_path / "out"
    for seed, site in enumerate(SITES):
        save(out / site, site, seed, ("topk", "jumprelu")[seed])
    for name in ("metrics.jsonl", "summary.json", "config.yaml", "resid_post.1/notes.txt"):
        (out / name).write_text("{}")
    for name in ("checkpoints/000000000004096", "wandb/offline-run-1", ".part-7"):
        (out / name).mkdir(parents=True)
        (out / name / "cfg.json").write_text("{}")
    return out


WANTED = [
    f"{site}/{name}" for site in sorted(SITES, key=lambda s: s[-1]) for name in (hub.CFG, hub.WEIGHTS, hub.METRICS)
]


def test_only_dictionaries_would_go_up(trained, capsys):
    assert main(["push", str(trained), "acme/saes", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*WANTED, "README.md", "7 files would be uploaded to acme/saes"]


def test_one_dictionary_goes_to_the_folder_of_its_site(trained, tmp_path):
    assert hub.push(trained / "mlp_out.2", "acme/saes", dry_run=True)[0] == "mlp_out.2/cfg.json"
    save(tmp_path / "mine", "resid_post.1")
    assert hub.push(tmp_path / "mine", "acme/saes", dry_run=True)[0] == "resid_post.1/cfg.json"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the hub client's own
def test_there_and_back(trained, tmp_path, capsys):
    from sae_lens import SAE

    uploads, got = tmp_path / "hub", {}
    with serve({}, uploads) as endpoint, using(endpoint, tmp_path / "cache", WRITER):
        assert main(["push", str(trained), "acme/saes", "--message", "Two sites", "--private"]) == 0
        assert main(["push", str(trained), "acme/saes", "--branch", "second"]) == 0
        for site in SITES:
            got[f"{site}/saepatch"] = load_sae(f"acme/saes/{site}").sae.state_dict()
            got[f"{site}/sae_lens"] = SAE.from_pretrained("acme/saes", site).state_dict()
        assert main(["push", str(trained), "acme/public", "--private", "--dry_run"]) == 0
        assert main(["push", str(trained), "acme/public"]) == 0
        assert main(["push", str(trained), "acme/public", "--private"]) == 2
    assert "'acme/public' exists and is public" in capsys.readouterr().err
    for site in SITES:
        want = load_file(trained / site / hub.WEIGHTS)
        assert want.keys() == got[f"{site}/saepatch"].keys() == got[f"{site}/sae_lens"].keys()
        for name, value in want.items():
            torch.testing.assert_close(got[f"{site}/saepatch"][name], value, rtol=0, atol=0)
            torch.testing.assert_close(got[f"{site}/sae_lens"][name], value, rtol=0, atol=0)
    for repository in ("acme/saes", "acme/saes@second"):
        folder = uploads / repository
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == sorted(
            [*WANTED, "README.md"]
        )
        assert (folder / "mlp_out.2/metrics.json").read_bytes() == (trained / "mlp_out.2/metrics.json").read_bytes()
    commits = (uploads / "commits.txt").read_text().splitlines()
    assert commits == [
        "acme/saes main Two sites",
        "acme/saes second Dictionaries at 2 sites, resid_post.1 to mlp_out.2",
        "acme/public main Dictionaries at 2 sites, resid_post.1 to mlp_out.2",
    ]


def one_error(capsys, trained, endpoint, home, token=WRITER):
    capsys.readouterr()
    with using(endpoint, home, token):
        assert main(["push", str(trained), "acme/saes"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.filterwarnings("ignore")  # the hub client's own
def test_a_hub_that_refuses_or_is_away(trained, tmp_path, capsys):
    with serve({}, tmp_path / "hub") as endpoint:
        refused = one_error(capsys, trained, endpoint, tmp_path / "cache", token="hf_reader")
        assert "the hub refuses 'acme/saes' (403" in refused
        assert "write access" in refused
        assert "HF_TOKEN" in one_error(capsys, trained, endpoint, tmp_path / "cache", token="")
    away = one_error(capsys, trained, "http://127.0.0.1:9", tmp_path / "cache")
    assert "cannot upload to 'acme/saes'" in away
    assert "check the network" in away


@pytest.mark.parametrize("name", ["saes", "a/b/c", "acme/..", "acme/sa es", "", "acme/-x", "acme/x--y"])
def test_names_that_no_repository_can_have(name, trained):
    with pytest.raises(UserError, match=r"is not a repository name|names no owner") as raised:
        hub.push(trained, name, dry_run=True)
    assert "\n" not in str(raised.value)


def test_folders_that_hold_no_dictionary(tmp_path, trained):
    with pytest.raises(UserError, match="no folder"):
        hub.push(tmp_path / "nowhere", "acme/saes", dry_run=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no dictionary"):
        hub.push(tmp_path / "empty", "acme/saes", dry_run=True)
    save(trained / "copy", "resid_post.1")
    with pytest.raises(UserError, match=r"are both for resid_post\.1"):
        hub.push(trained, "acme/saes", dry_run=True)


@pytest.mark.parametrize(("name", "content"), [(hub.WEIGHTS, b"\x00" * 40), (hub.CFG, b"[1]"), (hub.METRICS, b"{")])
def test_a_damaged_file_stays_at_home(trained, name, content):
    (trained / "mlp_out.2" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the dictionary in .*mlp_out\.2.*save it again") as raised:
        hub.push(trained, "acme/saes", dry_run=True)
    assert "\n" not in str(raised.value)


def test_weights_that_are_missing(trained):
    (trained / "mlp_out.2" / hub.WEIGHTS).unlink()
    with pytest.raises(UserError, match="cannot read the dictionary"):
        hub.push(trained, "acme/saes", dry_run=True)


def test_the_card(trained):
    text = hub.card(hub.saved_in(trained), "acme/saes")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "saelens",
        "tags": ["sparse-autoencoder", "sae", "saepatch"],
        "base_model": "acme/tiny",
    }
    assert 'SAE.from_pretrained("acme/saes", "resid_post.1")' in body
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("| ")
    ]
    assert table[0] == ["site", "architecture", "d_in", "d_sae", "l0", "fvu", "kl", "tokens"]
    assert table[2] == [r"resid\_post\.1", "topk", "16", "48", "6", "0.1235", "0.5", "4096"]
    assert table[3][:2] == [r"mlp\_out\.2", "jumprelu"]


HOSTILE = "a|b\n# <script>alert(1)</script> [x](http://evil.example) ![i](x) `c` **b** $m$ \u202e &copy; ~~s~~ @you"


def test_what_others_wrote_is_shown_as_text(tmp_path):
    save(
        tmp_path / "resid_post.1", "resid_post.1", model_name=HOSTILE, dataset_path="/home/someone/secret/stories.jsonl"
    )
    figures = {"fvu": HOSTILE, "l0": {"a": "|"}}
    (tmp_path / "resid_post.1/metrics.json").write_text(json.dumps(figures))
    text = hub.card(hub.saved_in(tmp_path), "acme/saes")
    assert yaml.safe_load(text.split("---\n")[1]).keys() == {"library_name", "tags"}
    body = text.split("---\n", 2)[2].replace("```python", "").replace("```", "")
    assert "someone" not in body
    assert "\u202e" not in body
    assert r"stories\.jsonl" in body
    shown = [line for line in body.splitlines() if "evil" in line]
    assert len(shown) == 3  # title line, list of what is known, table
    for line in shown:
        for char in "<>[]`*$~@&!_":
            bare = [i for i, c in enumerate(line) if c == char and line[i - 1] != "\\"]
            assert not bare, (char, line)
        assert "http://" not in line
    row = next(line for line in shown if line.startswith("| resid"))
    cells = row.replace("\\|", "").strip("| ").split(" | ")
    header = next(line for line in body.splitlines() if line.startswith("| site")).strip("| ").split(" | ")
    assert len(cells) == len(header)
