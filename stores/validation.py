"""`validate`: does a tree keep to the table?"""

import xarray as xr

from interp.stores.table import FORMAT, ROLES, TABLE, Variable, find_variable, node_rows

_KNOWN_NODES = sorted({v.node for v in TABLE if v.node})


def validate(tree: xr.DataTree) -> list[str]:
    """Return what is wrong with a tree as a run of this format, one sentence a problem; an empty list if
    nothing is.

    Dims, dtypes, required variables and token roles are checked; the bulk of the data is not read (see
    `verify`).

    >>> from interp.stores import synthetic_run
    >>> validate(synthetic_run().tree)
    []
    """
    problems = []
    if tree.attrs.get("format") != FORMAT:
        problems.append(f"the root attribute format is {tree.attrs.get('format')!r}, not {FORMAT!r}")
    if list(tree.sizes) != ["sample"]:
        problems.append(f"the root has dims {sorted(map(str, tree.sizes))}, but only sample may live there")
    for node in tree.subtree:
        if node.path == "/" or node.data_vars:
            problems += _node(node)
    return problems


def _node(node: xr.DataTree) -> list[str]:
    name = node.path.strip("/")
    if name and not node_rows(name) and not any(n.split("/")[0] == name.split("/")[0] for n in _KNOWN_NODES):
        return []  # an extra node: anybody may add one
    data = node.to_dataset(inherit=True)
    problems = []
    for row in node_rows(name).values():
        if row.required and row.name not in data.variables:
            problems.append(f"{name or 'the root'} lacks {row.name} {row.dims}")
    for key, variable in data.variables.items():
        path = f"{name}/{key}" if name else str(key)
        known = find_variable(path)
        if known is not None:
            problems += _variable(path, variable, known)
            if known.coord and str(key) not in data.coords:
                problems.append(f"{path} should open as a coordinate")
    if "token_role" in data.coords:
        strange = {str(r) for r in data["token_role"].values.ravel()} - {"", *ROLES}
        if strange:
            problems.append(f"{name}/token_role holds {sorted(strange)}; roles are {', '.join(ROLES)}")
    return problems


def _variable(path: str, variable: xr.Variable, row: Variable) -> list[str]:
    problems = []
    if "..." in row.dims:
        fixed = row.dims[: row.dims.index("...")]
        if variable.dims[: len(fixed)] != fixed:
            problems.append(f"{path} has dims {variable.dims}, which should begin with {fixed}")
    elif variable.dims != row.dims:
        problems.append(f"{path} has dims {variable.dims} instead of {row.dims}")
    found = variable.dtype.name if variable.dtype.kind in "iufb" else "str"
    if found not in row.dtypes:
        problems.append(f"{path} is {found}; expected {' or '.join(row.dtypes)}")
    return problems
