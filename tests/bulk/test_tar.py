import io
import tarfile

import pytest

from cmfast.bulk import tar


@pytest.mark.parametrize("sizes", [(), (0,), (1, 512, 513), (10240, 3), tuple(range(100, 400, 7))])
def test_the_bytes_are_those_of_tarfile(sizes):
    ours, theirs = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for i, size in enumerate(sizes):
            content = bytes(k % 251 for k in range(size))
            tar.add(ours, f"{i:08}.png", content)
            member = tarfile.TarInfo(f"{i:08}.png")
            member.size = size
            archive.addfile(member, io.BytesIO(content))
    tar.end(ours)
    assert ours.getvalue() == theirs.getvalue()
