"""The command line."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastattn import __version__, demo
from fastattn.cli import app


def test_info_says_what_runs_here() -> None:
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    for word in (__version__, "CPU kernels", "avx", "GPU kernels"):
        assert word in result.output


def test_demo_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "NEEDED", ("torch", "no_such_package"))
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "no_such_package: pip install 'fastattn[demo]'" in result.output


def test_demo_refuses_other_devices() -> None:
    result = CliRunner().invoke(app, ["demo", "--device", "tpu"])
    assert result.exit_code == 1
    assert "'tpu'; allowed: cpu, cuda" in result.output


def test_sentences_are_running_text() -> None:
    text = """# A heading that is long enough to pass for a sentence.

The first [sentence](link.md) has `code` in it, and a link. The second sentence is of some length as well.

```
This is code, however long the line may be that it stands on.
```

| a table | with cells that are long enough to be a sentence. |

- An item of a list, which goes on
  in its second line, is a sentence.
- Short.
"""
    assert demo.sentences(text) == [
        "The first sentence has code in it, and a link.",
        "The second sentence is of some length as well.",
        "An item of a list, which goes on in its second line, is a sentence.",
    ]


@pytest.mark.skipif(any(find_spec(name) is None for name in demo.NEEDED), reason="needs fastattn[demo]")
def test_the_encoder_gives_the_same_embeddings_with_fastattn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch
    from rich.console import Console

    monkeypatch.chdir(tmp_path)  # outside the repository: the text comes with the package
    seen = {}
    monkeypatch.setattr(
        demo, "_show_embeddings", lambda texts, stock, ours, *_: seen.update(texts=texts, pair=(stock, ours))
    )
    demo.embed_text(torch.device("cpu"), Console(quiet=True))
    assert len(seen["texts"]) > 10
    torch.testing.assert_close(*seen["pair"], atol=1e-5, rtol=0)
