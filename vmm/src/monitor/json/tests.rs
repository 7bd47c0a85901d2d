//! The reader's texts are those that a QEMU 7.2 storage daemon answers with.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::reader::{Limits, Reader};
use super::writer::write_line;

/// All messages in `input`, as values or as error texts.
fn read(input: &[u8]) -> Vec<Result<Value, String>> {
    read_with(input, Limits::default())
}

fn read_with(mut input: &[u8], limits: Limits) -> Vec<Result<Value, String>> {
    let mut reader = Reader::new(limits);
    std::iter::from_fn(|| reader.next(&mut input))
        .map(|message| message.map_err(|error| error.to_string()))
        .collect()
}

fn texts(input: &[u8]) -> Vec<String> {
    read(input)
        .into_iter()
        .map(|message| match message {
            Ok(value) => format!("ok {value}"),
            Err(text) => text
                .strip_prefix("JSON parse error, ")
                .unwrap_or(&text)
                .to_owned(),
        })
        .collect()
}

#[test]
fn every_mistake_has_its_text() {
    let cases: &[(&[u8], &[&str])] = &[
        (b"{\"execute\" \"x\"}\n", &["missing : in object pair"]),
        (b"nonsense\n", &["invalid keyword 'nonsense'"]),
        (b"[1,]\n", &["expecting value"]),
        (b"{\"a\":1,}\n", &["expecting value"]),
        (b"{,}\n", &["expecting value"]),
        (b"{]\n", &["expecting value"]),
        (b"[}\n", &["expecting value"]),
        (b"]\n", &["expecting value"]),
        (b":\n", &["expecting value"]),
        (b"\"abc\n", &["stray '\"abc\n'"]),
        (b"\xff{}", &["stray '\u{fffd}'", "ok {}"]),
        (b"\x01", &["stray '\u{1}'"]),
        (b"abc\0", &["invalid keyword 'abc'", "stray ''"]),
        (b"\"a\0", &["stray '\"a'"]),
        (b"-\n01\nnul \n", &["stray '-\n'", "invalid keyword 'nul'"]),
        (b"00\n", &["stray '00'"]),
        (b"-01\n", &["stray '-01'"]),
        (b"5.\n", &["stray '5.\n'"]),
        (b".5\n", &["stray '.'"]),
        (b"1-\n", &["ok 1", "stray '-\n'"]),
        (
            b"\"\\u00\"\n",
            &["\\u00\" is not a valid Unicode character"],
        ),
        (
            b"\"\\u12g4\"\n",
            &["\\u12g4 is not a valid Unicode character"],
        ),
        (
            b"\"\\ud800\"\n",
            &["\\ud800 is not a valid Unicode character"],
        ),
        (
            b"\"\\udc00\"\n",
            &["\\udc00 is not a valid Unicode character"],
        ),
        (b"\"\xc3\x28\"\n", &["invalid UTF-8 sequence in string"]),
        (b"\"\xed\xa0\x80\"\n", &["invalid UTF-8 sequence in string"]),
        (b"\"\\q\"\n", &["invalid escape sequence in string"]),
        (b"\"\\\n\"", &["stray '\"\\\n'"]),
        (b"{\"id\":1,\"id\":2}\n", &["duplicate key"]),
        (b"{1:2}\n", &["key is not a string in object"]),
        (b"{\"a\"}\n", &["missing : in object pair"]),
        (b"{\"a\":1 \"b\":2}\n", &["expected separator in dict"]),
        (b"{\"a\":1]\n", &["expected separator in dict"]),
        (b"[1 2]\n", &["expected separator in list"]),
        (b"[1,2\n}\n", &["expected separator in list"]),
        (b"abc_d\n", &["invalid keyword 'abc'", "stray '_'"]),
        (b"True\n", &["stray 'T'"]),
        (b"# \t x\n{}", &["stray '#'", "ok {}"]),
        (b"#:5\n", &["stray '#'", "expecting value", "ok 5"]),
        (b"#\r6\n", &["stray '#'", "ok 6"]),
        (b"#\xfe5\n", &["stray '#'", "stray '\u{fffd}'"]),
        (b"{\"a\":1,#}\n", &["stray '#'", "expecting value"]),
    ];
    for (input, expected) in cases {
        assert_eq!(texts(input), *expected, "{}", input.escape_ascii());
    }
}

#[test]
fn values_of_every_type_are_read() {
    let cases: &[(&[u8], Value)] = &[
        (b"{'a':'it\\'s \"x\"'}", json!({"a": "it's \"x\""})),
        (b"\"\\u00e9\xc3\xa9\\n\\/\\ud83d\\ude00\"", json!("éé\n/😀")),
        (b"\"\\u0000\"", json!("\0")),
        (b"18446744073709551615 ", json!(u64::MAX)),
        (b"-9223372036854775808 ", json!(i64::MIN)),
        (
            b"18446744073709551616 ",
            json!(18_446_744_073_709_551_616.0),
        ),
        (b"1.5e3 ", json!(1500.0)),
        (b"-0.5 ", json!(-0.5)),
        (b"1E+5 ", json!(100_000.0)),
        (b"[[1]\n,[true,null]]", json!([[1], [true, null]])),
    ];
    for (input, expected) in cases {
        assert_eq!(read(input), [Ok(expected.clone())]);
    }
}

#[test]
fn a_number_beyond_a_double_is_refused() {
    assert_eq!(texts(b"1e400 "), ["number is out of range"]);
}

#[test]
fn messages_arrive_however_the_bytes_are_cut() {
    let text = b"{\"execute\":\"query-jobs\",\"id\":[1,{\"x\":null}]}";
    let mut reader = Reader::new(Limits::default());
    let mut messages = Vec::new();
    for byte in text {
        let mut input = std::slice::from_ref(byte);
        messages.extend(reader.next(&mut input));
    }
    let expected = json!({"execute": "query-jobs", "id": [1, {"x": null}]});
    assert_eq!(messages, [Ok(expected)]);
}

#[test]
fn nesting_beyond_the_limit_is_refused_and_at_the_limit_read() {
    let depth = Limits::default().depth;
    let at_limit = [vec![b'['; depth], vec![b']'; depth]].concat();
    assert!(read(&at_limit)[0].is_ok());
    let over = vec![b'['; depth + 1];
    assert_eq!(texts(&over), ["JSON nesting depth limit exceeded"]);
}

#[test]
fn a_message_beyond_the_size_limit_is_refused() {
    let limits = Limits {
        size: 16,
        ..Limits::default()
    };
    let size = Err("JSON token size limit exceeded".to_owned());
    assert_eq!(read_with(b"\"0123456789abcdef\"", limits)[0], size);
    assert_eq!(read_with(b"[\"0123456\",\"0123456\"", limits)[0], size);
}

#[test]
fn a_message_of_too_many_tokens_is_refused() {
    let limits = Limits {
        tokens: 4,
        ..Limits::default()
    };
    let messages = read_with(b"[1,2,3]", limits);
    assert_eq!(
        messages[0],
        Err("JSON token count limit exceeded".to_owned())
    );
}

#[test]
fn a_line_is_spaced_and_in_ascii() {
    let line = write_line(&json!({"a": [1, "é😀\u{7f}\n\"x\""], "b": {}}));
    assert_eq!(
        String::from_utf8(line).unwrap(),
        "{\"a\": [1, \"\\u00E9\\uD83D\\uDE00\\u007F\\n\\\"x\\\"\"], \"b\": {}}\r\n"
    );
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(any::<String>(), inner, 0..6)
                .prop_map(|members| members.into_iter().collect::<Value>()),
        ]
    })
}

proptest! {
    #[test]
    fn any_bytes_are_survived_and_memory_stays_bounded(
        input in prop::collection::vec(any::<u8>(), 0..400)
    ) {
        let limits = Limits { size: 64, tokens: 16, depth: 8 };
        let messages = read_with(&input, limits);
        prop_assert!(messages.len() <= input.len());
    }

    #[test]
    fn rubbish_of_structure_is_survived(
        input in "[{}\\[\\]:,\"'a-e0-2 .\\-\\\\u\n]{0,200}"
    ) {
        read(input.as_bytes());
    }

    #[test]
    fn a_newline_after_rubbish_lets_the_next_message_through(
        rubbish in prop::collection::vec(any::<u8>(), 0..60)
    ) {
        // A closing quote or bracket may be missing: 0xff ends every message.
        let mut input = rubbish;
        input.extend_from_slice(b"\xff\n{\"execute\":\"query-jobs\"}");
        let messages = read(&input);
        prop_assert_eq!(messages.last().unwrap(), &Ok(json!({"execute": "query-jobs"})));
    }

    #[test]
    fn what_is_written_is_read_back(value in any_value()) {
        prop_assert_eq!(read(&write_line(&value)), [Ok(value)]);
    }
}
