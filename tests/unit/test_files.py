"""Training files in every container, and files made to hurt: records or one typed error, in bounded memory."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loquetier.errors import DataError
from loquetier.training.containers import FileLimits, detect_container, read_chunks
from loquetier.training.files import iter_records, read_records

MIB = 1 << 20
RECORDS = [{"prompt": "héllo", "completion": "wörld"}, {"prompt": 'a,"b"\nc', "completion": ""}]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def jsonl(records: list[Any]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def as_csv(records: list[dict[str, str]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().encode()


def parquet(records: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), out)
    return out.getvalue()


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_bytes(data: bytes, name: str = "data.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write_bytes


def errors(path: Path, limits: FileLimits | None = None) -> list[tuple[int, str]]:
    return [(record.line, str(record.error)) for record in iter_records(path, limits) if record.error is not None]


# --- containers ---

CONTENTS = {
    "jsonl": jsonl(RECORDS),
    "array": json.dumps(RECORDS).encode(),
    "pretty array": b" \n" + json.dumps(RECORDS, indent=2).encode(),
    "csv": as_csv(RECORDS),
    "csv with a BOM": codecs.BOM_UTF8 + as_csv(RECORDS),
    "BOM": codecs.BOM_UTF8 + jsonl(RECORDS),
    "BOM array": codecs.BOM_UTF8 + json.dumps(RECORDS).encode(),
    "CRLF": jsonl(RECORDS).replace(b"\n", b"\r\n"),
    "blank lines": b"\n\r\n" + jsonl(RECORDS).replace(b"\n", b"\n  \n\t\n"),
    "no line end": jsonl(RECORDS).rstrip(),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_the_container_is_told_by_content(content: bytes, pack: Any, write: Any) -> None:
    # The name says something else on purpose.
    assert read_records(write(pack(content), "data.parquet")) == RECORDS


def test_parquet(write: Any) -> None:
    path = write(parquet(RECORDS), "data.jsonl")
    assert detect_container(path) == "parquet"
    assert read_records(path) == RECORDS
    assert [record.line for record in iter_records(path)] == [1, 2]


def test_nulls_of_parquet_are_absent_keys(write: Any) -> None:
    """A struct column has every key in every row: without this each message would have a "weight"."""
    records = [
        {"messages": [{"role": "user", "content": "v"}], "tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 1}]},
    ]
    assert read_records(write(parquet(records))) == records


def test_members_of_gzip_and_frames_of_zstd_may_follow_each_other(write: Any) -> None:
    for pack in (gzip.compress, zstd):
        assert read_records(write(pack(jsonl(RECORDS[:1])) + pack(jsonl(RECORDS[1:])))) == RECORDS


def test_the_older_name_reads_all_containers(write: Any) -> None:
    assert read_records(write(gzip.compress(jsonl(RECORDS)))) == RECORDS


def test_an_empty_file_has_no_records(write: Any) -> None:
    for content in (b"", b"\n\n", b" ", codecs.BOM_UTF8, gzip.compress(b"")):
        assert read_records(write(content)) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@given(records=st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=6), data=st.data())
def test_json_round_trip(records: list[dict[str, Any]], data: st.DataObject, tmp_path_factory: Any) -> None:
    """Any records, in any of the JSON shapes, packed or not, come back equal and at their lines."""
    content = codecs.BOM_UTF8 if data.draw(st.booleans()) else b""
    end = data.draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
    lines = [json.dumps(record, ensure_ascii=data.draw(st.booleans())).encode() for record in records]
    is_array = data.draw(st.booleans())
    content += b"[" + b",".join(lines) + b"]" if is_array else b"".join(line + end for line in lines)
    path = tmp_path_factory.mktemp("round") / "x"
    path.write_bytes(data.draw(st.sampled_from([bytes, gzip.compress, zstd]))(content))
    found = list(iter_records(path))
    assert [record.value for record in found] == records
    step = 2 if end == b"\n\n" and not is_array else 1
    assert [record.line for record in found] == list(range(1, 1 + step * len(records), step))


@given(st.binary(max_size=300))
def test_any_bytes_give_records_or_a_data_error(content: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        for prefix in (b"", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"[", b'{"a":', b"text\n"):
            Path(file.name).write_bytes(prefix + content)
            try:
                found = list(iter_records(Path(file.name)))
            except DataError:
                continue
            assert all((record.value is None) != (record.error is None) for record in found)


# --- lines that are wrong ---


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1,}', "line contains invalid json: .*line 1 column 9"),
        (b'{"a": NaN}', "NaN is not a JSON value"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'"),
        (b'{"a": {"b": 1, "b": 1}}', "duplicate key 'b'"),
        (b'"text"', r'Line 2 is not a dictionary \(HINT: line starts with: ""text""\)'),
        (b"[1, 2]", "Line 2 is not a dictionary"),
        (b"3", "Line 2 is not a dictionary"),
        (b"null", "Line 2 is not a dictionary"),
        (b"some words and no JSON", r'HINT: line starts with: "some words and no JS\.\.\."'),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at byte 16 of the file"),
        (b'{"a": ' + b"[" * 100_000 + b"}", "line contains invalid json"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "line contains invalid json"),
    ],
)
def test_a_bad_line_is_named_and_does_not_hide_the_rest(line: bytes, reason: str, write: Any) -> None:
    path = write(b'{"x": 1}\n' + line + b'\n{"x": 3}\n')
    found = list(iter_records(path))
    assert [(record.line, record.value) for record in found] == [(1, {"x": 1}), (2, None), (3, {"x": 3})]
    with pytest.raises(DataError, match=f"line 2: .*{reason}"):
        read_records(path)


def test_elements_of_an_array_that_are_no_dictionaries(write: Any) -> None:
    assert errors(write(b'[{"a": 1}, 2, {"a": 3}]')) == [(2, "element 2 is not a dictionary but int")]
    with pytest.raises(DataError, match="begins like a JSON array but contains invalid json"):
        read_records(write(b'[{"a": 1}, '))


def test_one_list_per_line_is_not_an_array(write: Any) -> None:
    path = write(b'[{"role": "user"}]\n[{"role": "user"}]\n')
    assert [line for line, _ in errors(path)] == [1, 2]


def test_rows_of_csv_that_do_not_fit_the_header(write: Any) -> None:
    path = write(b"prompt,completion\na,b\nc\nd,e,f\n\ng,h\n")
    assert errors(path) == [
        (3, "the row has 1 fields, but the header has 2"),
        (4, "the row has 3 fields, but the header has 2"),
    ]
    assert [r.value for r in iter_records(path) if r.value] == [
        {"prompt": "a", "completion": "b"},
        {"prompt": "g", "completion": "h"},
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"text,text\na,b\n", "names a column twice"),
        (b'prompt,completion\n"a,b\nc,d\n', "not valid CSV"),
        (b"prompt,completion\na,\xff\n", "line 2: not UTF-8: byte 0xff"),
    ],
)
def test_csv_that_cannot_be_read_on(content: bytes, reason: str, write: Any) -> None:
    with pytest.raises(DataError, match=reason):
        read_records(write(content))


# --- files that are wrong ---


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_named(encoding: str, write: Any) -> None:
    with pytest.raises(DataError, match=r"is UTF-16 or UTF-32 \(byte 0 is 0x"):
        read_records(write('{"text": "a"}\n'.encode(encoding)))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nothing\.jsonl: No such file"):
        read_records(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match=r"cannot read .*directory"):
        read_records(tmp_path)


# A zstd frame need not carry a checksum: flipped bytes there may decode to other text, which nothing can tell.
@pytest.mark.parametrize(
    ("kind", "damage"), [("gzip", "cut"), ("gzip", "flip"), ("zstd", "cut"), ("parquet", "cut"), ("parquet", "flip")]
)
def test_damaged_archives(kind: str, damage: str, write: Any) -> None:
    # Random-looking text: a flipped bit in the middle then hits data and not slack.
    records = [{"text": zlib.crc32(str(i).encode()).to_bytes(4, "big").hex() * 9} for i in range(500)]
    content = {"gzip": gzip.compress(jsonl(records)), "zstd": zstd(jsonl(records)), "parquet": parquet(records)}[kind]
    middle = len(content) // 2
    bad = content[:middle]
    if damage == "flip":
        bad += bytes(byte ^ 0xFF for byte in content[middle : middle + 40]) + content[middle + 40 :]
    with pytest.raises(DataError, match=f"damaged .*{kind}|damaged or cut off {kind}|not UTF-8|invalid json"):
        read_records(write(bad))


# --- files that are too large ---


def test_a_long_line_is_refused_before_it_is_held(write: Any) -> None:
    limits = FileLimits(max_line_bytes=MIB)
    path = write(jsonl([{"text": "a"}]) + b'{"text": "' + b"x" * (4 * MIB))
    records = iter_records(path, limits)
    assert next(records).value == {"text": "a"}
    with pytest.raises(DataError, match=r"line 2 has more than 1048576 bytes"):
        next(records)


def test_a_line_at_the_limit_is_read(write: Any) -> None:
    line = jsonl([{"text": "a" * 1000}])
    assert len(read_records(write(line * 3), FileLimits(max_line_bytes=len(line) - 1))) == 3
    with pytest.raises(DataError, match="line 1 has more than"):
        read_records(write(line * 3), FileLimits(max_line_bytes=len(line) - 2))


def test_a_file_over_the_limit(write: Any) -> None:
    content = jsonl([{"text": "a"}] * 100)
    for pack in (bytes, gzip.compress, zstd):
        with pytest.raises(DataError, match="more than 500 bytes after decompression"):
            read_records(write(pack(content)), FileLimits(max_bytes=500))
    with pytest.raises(DataError, match="JSON array of more than 500 bytes"):
        read_records(write(json.dumps([{"text": "a"}] * 100).encode()), FileLimits(max_document_bytes=500))
    with pytest.raises(DataError, match="more than 500 bytes once decoded"):
        read_records(write(parquet([{"text": "a" * 100}] * 100)), FileLimits(max_bytes=500))


@pytest.mark.parametrize(
    "content",
    [b"{}\n" * 11, b"\n" * 11, json.dumps([{}] * 11).encode(), b"text\n" + b"a\n" * 11, parquet([{"x": None}] * 11)],
    ids=["jsonl", "blank", "array", "csv", "nulls in parquet"],
)
def test_too_many_lines(content: bytes, write: Any) -> None:
    """Rows that weigh nothing in the file, as nulls in parquet, still cost memory each."""
    with pytest.raises(DataError, match="more than 10 lines"):
        read_records(write(content), FileLimits(max_lines=10))


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_bomb_is_stopped_early(kind: str, write: Any) -> None:
    """1 GiB of zeros in 1 MiB (gzip) or 32 KiB (zstd): stopped when the ratio rule begins, 64 MiB in."""
    part = bytes(16 * MIB)
    pack = gzip.compress if kind == "gzip" else zstd
    path = write(pack(part) * 64)
    size = 0
    with pytest.raises(DataError, match="decompression bombs"):
        for chunk in read_chunks(path, kind, FileLimits()):  # type: ignore[arg-type]
            assert len(chunk) <= 1 << 16
            size += len(chunk)
    # gzip cannot pass 1032 to 1, so a gzip of 1 MiB is stopped at 200 MiB at the latest.
    assert size <= 210 * MIB


def test_a_field_of_csv_over_the_limit(write: Any) -> None:
    path = write(b"text\n" + b"a" * 500 + b"\nb\n")
    found = list(iter_records(path, FileLimits(max_line_bytes=1000)))
    assert [record.line for record in found] == [2, 3]
    quoted = write(b'text\n"' + b"ab\n" * 500 + b'"\nb\n')
    (first, _) = iter_records(quoted, FileLimits(max_line_bytes=1000))
    assert "a field has 1500 characters" in str(first.error)


# --- without pyarrow ---


@pytest.mark.parametrize("content", [zstd(b"{}"), parquet([{"text": "a"}])], ids=["zstd", "parquet"])
def test_missing_pyarrow_says_how_to_install_it(content: bytes, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'loquetier\[data\]'"):
        read_records(write(content))
    assert read_records(write(gzip.compress(jsonl(RECORDS)))) == RECORDS
