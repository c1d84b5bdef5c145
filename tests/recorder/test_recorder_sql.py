from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from recorder_samples import incident

from latencyprism.errors import BadInput
from latencyprism.recorder.sql import Sql, words_of
from latencyprism.recorder.sql_gate import allowed_functions, check


@pytest.fixture(scope="module")
def sql() -> Iterator[Sql]:
    pytest.importorskip("chdb", reason="the extra store is not installed")
    made = Sql([("a", incident(20))])
    yield made
    made.close()


def test_what_computes_is_allowed(sql: Sql) -> None:
    for text in (
        "select count(), avg(kv_usage), quantileIf(0.9)(execute_ns, phase = 'decode') from steps",
        "select step, lagInFrame(end_ns) over (order by step) as before from steps limit 2",
        "select countDistinct(track), uniqExact(name), groupArray(5)(name) from spans",
        "select case when step > 5 then 'late' else 'early' end as half, count() from steps group by half",
        "select toStartOfSecond(fromUnixTimestamp64Nano(start_ns)), arrayMap(x -> x + 1, [1, 2]) from steps",
        "with t as (select step from steps) select * from t union all select number from numbers(2)",
        "select s.step from steps s left join counters c on c.time_ns = s.end_ns limit 1 by s.step",
        "select * except (engine) from steps where (step, rank) in (select step, rank from steps)",
        "select if(waiting > 0, 1, 0), JSONExtractString(ranking, 1, 'cause') from steps, verdicts limit 1;",
    ):
        assert sql.ask(text, "csv")


@pytest.mark.parametrize(
    "text",
    [
        "select file('/etc/passwd')",
        "select * from file('/etc/passwd', 'RawBLOB')",
        "select * from FILE('/etc/passwd')",
        "select (select * from file('/etc/passwd', 'RawBLOB'))",
        "select arrayMap(x -> file(x), ['/etc/passwd'])",
        "select 1 from steps where file('/etc/passwd') != ''",
        "select * from url('http://127.0.0.1:1/', 'CSV', 'a String')",
        "select * from s3('http://127.0.0.1/a')",
        "select * from remote('127.0.0.1', 'system', 'one')",
        "select * from executable('x', 'CSV', 'a String')",
        "select * from Python(o)",
        "select * from merge('system', '.*')",
        "select * from view(select 1)",
        "select * from sqlite('/var/a', 'b')",
        "select * from loop(steps)",
        "select * from input('a Int8')",
        "select * from system.settings",
        "select * from `system`.`one`",
        "select 1 in system.one",
        "select * from information_schema.tables",
        "select dictGet('a', 'b', 1)",
        "select getSetting('readonly')",
        "select getMacro('x')",
        "select hostName()",
        "select FQDN()",
        "select sleep(3)",
        "select AIGenerate('x')",
        "select addressToLine(1)",
        "select tid()",
        "select currentUser()",
        "select joinGet('a', 'b', 1)",
        "select 1 into outfile '/var/h'",
        "select 1 settings readonly = 0",
        "select 1 format CSV",
        "select * apply(file) from steps",
        "insert into steps select * from steps",
        "drop table steps",
        "create table x (a Int8) engine = Memory",
        "set readonly = 0",
        "select 1; select 2",
        "show tables",
        "explain select 1",
        "describe table steps",
        "attach table y (a Int8) engine = File(CSV, '/etc/passwd')",
        "kill query where 1",
        "system shutdown",
        "use default",
        "backup table steps to Disk('a', 'b')",
        "select * from '/etc/passwd'",
        "select * from `/etc/passwd`",
        "select fileIf('/etc/passwd', 1)",
    ],
)
def test_nothing_but_these_tables_can_be_read(sql: Any, text: str) -> None:
    with pytest.raises(BadInput) as refused:
        sql.ask(text, "csv")
    assert "root:" not in str(refused.value) and refused.value.why


def test_a_function_is_allowed_by_its_kind_and_in_no_other_spelling() -> None:
    allowed = allowed_functions(
        [("count", "", 1), ("plus", "", 1), ("File", "", 0), ("file", "", 0), ("add", "plus", 0)]
    )
    assert {"count", "plus", "add"} <= allowed and "file" not in allowed

    def tree(name: str) -> str:
        return json.dumps({"type": "SelectWithUnionQuery", "x": [{"type": "Function", "name": name}]})

    check(tree("countIf"), allowed)
    check(tree("countOrNullIf"), allowed)
    for name in ("file", "fileIf", "if", "countx", ""):
        with pytest.raises(Exception, match="unknown or not allowed"):
            check(tree(name), allowed)


def test_the_words_of_an_error_have_no_codes() -> None:
    said = (
        "Code: 47. DB::Exception: Unknown identifier `x`. In scope SELECT x FROM steps. (UNKNOWN_IDENTIFIER)"
    )
    assert words_of(said) == "Unknown identifier `x`. In scope SELECT x FROM steps"
    assert len(words_of("x" * 10_000)) == 600
