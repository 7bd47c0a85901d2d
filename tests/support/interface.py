"""Holds what a monitor says against what it says of itself (query-qmp-schema)."""


class Interface:
    """The interface of a program, as it describes it."""

    def __init__(self, rows):
        self.rows = {row["name"]: row for row in rows}

    def check_reply(self, command, value):
        """What a command has returned is of the type that was promised."""
        row = self.rows.get(command)
        assert row and row["meta-type"] == "command", f"{command} is not in query-qmp-schema"
        self._check(row["ret-type"], value, command)

    def check_event(self, event):
        row = self.rows.get(event["event"])
        assert row and row["meta-type"] == "event", f"{event} is not in query-qmp-schema"
        self._check(row["arg-type"], event.get("data", {}), event["event"])

    def _check(self, name, value, where):
        row = self.rows[name]
        getattr(self, f"_check_{row['meta-type']}")(row, value, where)

    @staticmethod
    def _check_builtin(row, value, where):
        kinds = {"string": str, "int": int, "boolean": bool, "null": type(None), "value": object}
        kind = kinds[row["json-type"]]
        right = isinstance(value, kind) and (kind is not int or not isinstance(value, bool))
        assert right, f"{where}: {value!r} is no {row['name']}"

    @staticmethod
    def _check_enum(row, value, where):
        assert value in row["values"], f"{where}: {value!r} is none of {row['values']}"

    def _check_array(self, row, value, where):
        assert isinstance(value, list), f"{where}: {value!r} is no list"
        for index, element in enumerate(value):
            self._check(row["element-type"], element, f"{where}[{index}]")

    def _check_object(self, row, value, where):
        assert isinstance(value, dict), f"{where}: {value!r} is no object"
        members = list(row["members"])
        if "tag" in row:
            case = next(variant for variant in row["variants"]
                        if variant["case"] == value.get(row["tag"]))
            members += self.rows[case["type"]]["members"]
        for member in members:
            inner = f"{where}.{member['name']}"
            if member["name"] in value:
                self._check(member["type"], value[member["name"]], inner)
            else:
                assert "default" in member, f"{inner} is missing"
        unknown = set(value) - {member["name"] for member in members}
        assert not unknown, f"{where}: {unknown} not in query-qmp-schema"
