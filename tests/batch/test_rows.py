"""Prompt files: what is read from each format, and that bad ones are refused whole, by row and line (T8)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from scfg_fast import SCFGConfig
from scfg_fast.batch import InputError, generate
from scfg_fast.batch.plan import MicroBatch, new_batches
from scfg_fast.batch.rows import Row, read_rows
from tests.batch.pipelines import fake

ROWS = [
    {"prompt": "a red apple"},
    {
        "prompt": 'a "blue" car, and\na tree', "id": "car", "seed": 7, "negative_prompt": "a dog", "width": 72,
        "height": 64, "num_inference_steps": 3, "guidance_scale": 4.5, "rate_max": 1.5,
    },
]  # fmt: skip


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def jsonl(path: Path) -> Path:
    return write(
        path / "p.jsonl", b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r\n\n" + json.dumps(ROWS[1]).encode()
    )


def csv(path: Path) -> Path:
    text = (
        "prompt,id,seed,negative_prompt,width,height,num_inference_steps,guidance_scale,rate_max\n"
        'a red apple,,,,,,,,\n"a ""blue"" car, and\na tree",car,7,a dog,72,64,3,4.5,1.5\n'
    )
    return write(path / "p.csv", text)


def parquet_file(path: Path) -> Path:
    names = list(ROWS[1])
    parquet.write_table(pyarrow.Table.from_pylist([{n: row.get(n) for n in names} for row in ROWS]), path / "p.parquet")
    return path / "p.parquet"


@pytest.mark.parametrize("make", [jsonl, csv, parquet_file])
def test_formats_are_read_alike(tmp_path: Path, make) -> None:
    rows = read_rows(make(tmp_path), defaults={"guidance_scale": 5.0}, seed=3)
    seed = int.from_bytes(hashlib.sha256(b"3|00000001").digest()[:7], "big")
    assert rows[0] == Row("00000001", "a red apple", seed, '{"guidance_scale": 5.0}')
    assert (rows[1].id, rows[1].prompt, rows[1].seed) == ("car", ROWS[1]["prompt"], 7)
    assert json.loads(rows[1].call) == {
        "negative_prompt": "a dog", "width": 72, "height": 64, "num_inference_steps": 3, "guidance_scale": 4.5,
        "scfg_kwargs": {"rate_max": 1.5},
    }  # fmt: skip


def test_rows_of_python() -> None:
    rows = read_rows([{"prompt": "a", "scfg_kwargs": {"enabled": False, "powers": 2}, "width": 64.0, "id": 5}])
    assert (rows[0].id, json.loads(rows[0].call)) == (
        "5",
        {"scfg_kwargs": {"enabled": False, "powers": 2}, "width": 64},
    )


BAD = {
    "broken JSON": ('{"prompt": "a"}\n\n{"prompt": \n', ["row 2, line 3: it is not JSON"]),
    "not an object": ("[1]\n", ["row 1, line 1: it must be an object"]),
    "not UTF-8": (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', ["row 2, line 2: it is not UTF-8"]),
    "several": (
        '{"prompt": ""}\n{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x", "seed": -1}\n'
        '{"id": "y"}\n{"prompt": 3}\n',
        [
            "row 1, line 1: the prompt is empty", "row 3, line 3: seed must be",
            "row 3, line 3: id 'x' is that of row 2, line 2 too", "row 4, line 4: the prompt is empty",
            "row 5, line 5: prompt must be text",
        ],
    ),
    "values": (
        '{"prompt": "a", "width": 65, "height": 8, "num_inference_steps": 0, "guidance_scale": 1, "prmpt": 1}\n',
        ["unknown columns prmpt", "width must", "height must", "num_inference_steps must", "guidance_scale must"],
    ),
    "settings": (
        '{"prompt": "a", "rate_max": -1}\n{"prompt": "a", "scfg_kwargs": 2}\n', ["rate_max must", "scfg_kwargs must"],
    ),
    "empty": ("\n", ["there is no row"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_all_named_and_nothing_is_made(tmp_path: Path, name: str) -> None:
    text, reasons = BAD[name]
    path = write(tmp_path / "p.jsonl", text)
    with pytest.raises(InputError) as caught:
        generate(path, tmp_path / "out", load=fake)
    assert len(caught.value.reasons) == len(reasons)
    assert all(reason in str(caught.value) for reason in reasons)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, text, reason", [
    ("p.csv", "prompt\na\nb,c\n", "row 2, line 3: 2 cells under 1 columns"),
    ("p.csv", "prompt,seed\na,b\n", "row 1, line 2: seed must be a whole number"),
    ("p.csv", 'prompt\n"a\nb', "it is not CSV"), ("p.csv", "id,id\n1,2\n", "two columns have one name"),
    ("p.csv", b"prompt\na\n\xff\n", "line 3: it is not UTF-8"), ("p.parquet", "PAR1", "it is not Parquet"),
    ("p.txt", "a", "prompts are read from .jsonl, .csv, .parquet files"),
])  # fmt: skip
def test_bad_files(tmp_path: Path, name: str, text: str | bytes, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        read_rows(write(tmp_path / name, text))
    assert reason in str(caught.value)


def test_the_first_twenty_reasons_are_shown(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 20: .*; and 5 more$") as caught:
        read_rows([{"prompt": ""}] * 25)
    assert len(caught.value.reasons) == 25 and "row 21" not in str(caught.value)
    with pytest.raises(InputError, match="there is no such file"):
        read_rows(tmp_path / "none.jsonl")


def test_plain_guidance_has_no_settings_and_allows_a_scale_of_one() -> None:
    assert json.loads(read_rows([{"prompt": "a", "guidance_scale": 1}], guidance="cfg")[0].call) == {
        "guidance_scale": 1.0
    }
    with pytest.raises(InputError, match="plain guidance"):
        read_rows([{"prompt": "a", "rate_max": 2.0}], guidance="cfg")
    with pytest.raises(InputError, match="rate_min must not exceed"):
        read_rows([{"prompt": "a", "rate_max": 1.0}], config=SCFGConfig(rate_min=2.0))


def rows(count: int, call: str = "{}") -> list[Row]:
    return [Row(f"{i:02d}", f"prompt {i}", i, call) for i in range(count)]


def test_micro_batches_are_grouped_by_call_and_cut() -> None:
    mixed = [
        Row(row.id, row.prompt, row.seed, "{}" if index % 3 else '{"width": 64}') for index, row in enumerate(rows(9))
    ]
    batches = new_batches(mixed, [], 4)
    assert [batch.ids for batch in batches] == [("00", "03", "06"), ("01", "02", "04", "05"), ("07", "08")]
    assert len({batch.name for batch in batches}) == 3 and all(len(batch.name) == 16 for batch in batches)
    assert new_batches(mixed, batches, 4) == []


def test_the_name_follows_from_the_content() -> None:
    batch = MicroBatch(("1",), ("a",), (3,), "{}")
    assert batch.name == MicroBatch(("1",), ("a",), (3,), "{}").name
    others = [(("2",), ("a",), (3,), "{}"), (("1",), ("b",), (3,), "{}"), (("1",), ("a",), (4,), "{}")]
    assert len({batch.name, *(MicroBatch(*other).name for other in others)}) == 4


def test_planned_rows_may_not_change() -> None:
    planned = new_batches(rows(3), [], 2)
    changed = [Row("00", "prompt 0", 5, "{}"), *rows(3)[1:]]
    with pytest.raises(InputError, match="id '00' was planned with the seed 0 and has 5 now"):
        new_batches(changed, planned, 2)
