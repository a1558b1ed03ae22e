"""Memory of codes is lent again, never while a file is being written from it."""

import torch

from quantpress.engine.code_memory import CodeMemory


def test_what_is_written_waits_for_one_more_block() -> None:
    memory = CodeMemory()
    kept, packed = memory.take((2, 8)), memory.take((2, 8))
    assert kept.data_ptr() != packed.data_ptr()
    memory.settle([kept.view(torch.float8_e4m3fn), torch.zeros(2)])
    following = memory.take((2, 8)), memory.take((2, 8)), memory.take((8, 2))
    assert following[0].data_ptr() == packed.data_ptr()
    assert all(one.data_ptr() != kept.data_ptr() for one in following)
    memory.settle([])
    again = {memory.take((2, 8)).data_ptr() for _ in range(3)}
    assert again == {kept.data_ptr(), packed.data_ptr(), following[1].data_ptr()}
