"""The README's example runs as it stands."""

from pathlib import Path


def test_example_runs():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    code = text.split("<!-- example -->")[1].split("```python\n")[1].split("```")[0]
    namespace: dict[str, object] = {}
    exec(code, namespace)
    assert namespace["y"].shape == (8, 64, 56, 56)
    assert namespace["layer"].lam.grad is not None
