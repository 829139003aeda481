def mips_topk(
    queries: int,
    num_queries: int,
    rows: int,
    dtype: int,
    num_rows: int,
    d: int,
    row_stride: int,
    row_scale: int,
    ids: int,
    exclude_offsets: int,
    exclude_ids: int,
    num_exclude_ids: int,
    allow: int,
    allow_stride: int,
    k: int,
    threads: int,
    values: int,
    positions: int,
    /,
) -> None: ...
def isa() -> str: ...
def isas() -> list[tuple[str, bool]]: ...
