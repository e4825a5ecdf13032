import psutil
import pytest

from lenvm_lightning.utils.memory import free_memory


def test_no_container(tmp_path):
    free = free_memory(tmp_path)
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)  # others take and give meanwhile


@pytest.mark.parametrize(("limit", "expected"), [("1000000", 1000000 - 300000 + 50000), ("200000", 0)])
def test_a_container_with_a_limit(tmp_path, limit, expected):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 250000\ninactive_file 50000\n")
    assert free_memory(tmp_path) == expected


def test_a_container_without_a_limit(tmp_path):
    for name, text in (("memory.max", "max\n"), ("memory.current", "300000\n"), ("memory.stat", "anon 250000\n")):
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
