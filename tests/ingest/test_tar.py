import io
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from ingest.tar import DeterministicTar

MEMBERS = {"000000000.jpg": b"\xff\xd8picture", "000000000.txt": b"", "000000000.json": b"{}" * 600}


def archive(members: dict[str, bytes]) -> tuple[bytes, dict[str, int]]:
    file = io.BytesIO()
    with DeterministicTar(file) as tar:
        offsets = {name: tar.add(name, data) for name, data in members.items()}
    return file.getvalue(), offsets


@given(
    st.dictionaries(st.text("abc.09", min_size=1, max_size=90).filter(lambda n: n.strip(".")), st.binary(max_size=1500))
)
def test_tarfile_reads_what_was_written_at_the_offsets_told(members: dict[str, bytes]):
    data, offsets = archive(members)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {info.name: tar.extractfile(info).read() for info in tar} == members  # type: ignore[union-attr]
        assert {info.name: info.offset_data for info in tar} == offsets
        assert all((info.mtime, info.uid, info.gid, info.uname) == (0, 0, 0, "") for info in tar)
    assert all(data[offset : offset + len(members[name])] == members[name] for name, offset in offsets.items())


def test_equal_members_give_equal_bytes_equal_to_tarfiles_ustar():
    data, _ = archive(MEMBERS)
    assert archive(MEMBERS)[0] == data
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in MEMBERS.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    # tarfile pads the archive to records of 20 blocks; the members are the same bytes.
    assert file.getvalue()[: len(data)] == data


# webdataset leaves closing the archive to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_reads_it(tmp_path: Path):
    (tmp_path / "00000000.tar").write_bytes(archive(MEMBERS)[0])
    samples = list(webdataset.WebDataset(f"{tmp_path}/00000000.tar", shardshuffle=False, empty_check=False))
    assert [(sample["__key__"], sample["jpg"], sample["txt"]) for sample in samples] == [
        ("000000000", MEMBERS["000000000.jpg"], b"")
    ]


def test_a_name_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        archive({"x" * 101: b""})
