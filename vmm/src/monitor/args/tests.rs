use proptest::prelude::*;
use serde_json::json;

use super::*;

fn args(value: Value) -> Args {
    let Value::Object(members) = value else {
        panic!("arguments are an object");
    };
    Args::new(members)
}

fn text<T>(result: Result<T, QmpError>) -> String {
    match result {
        Ok(_) => panic!("accepted"),
        Err(error) => error.desc,
    }
}

#[test]
fn a_missing_argument_is_named_with_its_path() {
    assert_eq!(
        text(args(json!({})).required_str("id")),
        "Parameter 'id' is missing"
    );
    let mut outer = args(json!({"file": {}}));
    let mut inner = outer.optional_object("file").unwrap().unwrap();
    assert_eq!(
        text(inner.required_str("filename")),
        "Parameter 'file.filename' is missing"
    );
}

#[test]
fn a_wrong_type_is_named_with_what_was_expected() {
    let mut given = args(json!({
        "id": null, "force": "yes", "speed": 1.5, "list": 1, "element": [1],
        "cache": 5, "file": null
    }));
    let wrong = |name: &str, expected: &str| {
        format!("Invalid parameter type for '{name}', expected: {expected}")
    };
    assert_eq!(text(given.required_str("id")), wrong("id", "string"));
    assert_eq!(
        text(given.optional_bool("force")),
        wrong("force", "boolean")
    );
    assert_eq!(text(given.required_i64("speed")), wrong("speed", "integer"));
    assert_eq!(
        text(given.optional_enum_list("list", &[("a", 1)])),
        wrong("list", "array")
    );
    assert_eq!(
        text(given.optional_enum_list("element", &[("a", 1)])),
        wrong("element[0]", "string")
    );
    assert_eq!(
        text(given.optional_object("cache")),
        wrong("cache", "object")
    );
    assert_eq!(
        text(given.required_string_or_object("file", "BlockdevRef")),
        wrong("file", "BlockdevRef")
    );
    given.finish().unwrap();
}

#[test]
fn integers_outside_their_type_are_refused() {
    let mut given = args(json!({
        "speed": 9_223_372_036_854_775_808_u64, "a": -1, "b": 1_u64 << 32, "c": 0.5, "d": -1
    }));
    assert_eq!(
        text(given.required_i64("speed")),
        "Invalid parameter type for 'speed', expected: integer"
    );
    assert_eq!(
        text(given.optional_u32("a")),
        "Parameter 'a' expects uint32_t"
    );
    assert_eq!(
        text(given.optional_u32("b")),
        "Parameter 'b' expects uint32_t"
    );
    assert_eq!(
        text(given.optional_u64("c")),
        "Parameter 'c' expects uint64"
    );
}

#[test]
fn what_a_value_means_is_looked_at_after_the_form_of_all_arguments() {
    let negative = "Parameter 'd' expects a non-negative number below 2^64";
    let mut outer = args(json!({"inner": {"d": -1}, "e": -1, "unknown": 1}));
    let mut inner = outer.optional_object("inner").unwrap().unwrap();
    assert_eq!(inner.optional_non_negative("d").unwrap(), None);
    inner.finish().unwrap();
    assert_eq!(outer.optional_non_negative("e").unwrap(), None);
    let mut unknown = args(json!({"d": -1, "unknown": 1}));
    unknown.optional_non_negative("d").unwrap();
    assert_eq!(text(unknown.finish()), "Parameter 'unknown' is unexpected");
    outer.required_any("unknown").unwrap();
    assert_eq!(text(outer.finish()), negative, "the first");
}

#[test]
fn an_unsigned_integer_may_use_all_its_bits() {
    let mut given = args(json!({"a": u64::MAX}));
    assert_eq!(given.optional_u64("a").unwrap(), Some(u64::MAX));
    given.finish().unwrap();
}

#[test]
fn an_unknown_word_is_refused_by_its_short_name() {
    let mut outer = args(json!({"file": {"driver": "floppy"}, "enable": ["nope"]}));
    let mut inner = outer.optional_object("file").unwrap().unwrap();
    assert_eq!(
        text(inner.required_enum("driver", &[("raw", 1)])),
        "Parameter 'driver' does not accept value 'floppy'"
    );
    assert_eq!(
        text(outer.optional_enum_list("enable", &[("oob", 1)])),
        "Parameter 'null' does not accept value 'nope'"
    );
}

#[test]
fn what_nobody_takes_is_unexpected() {
    assert_eq!(
        text(args(json!({"why": 1})).finish()),
        "Parameter 'why' is unexpected"
    );
    let mut outer = args(json!({"cache": {"dirct": true}}));
    let inner = outer.optional_object("cache").unwrap().unwrap();
    assert_eq!(
        text(inner.finish()),
        "Parameter 'cache.dirct' is unexpected"
    );
}

#[test]
fn dotted_keys_become_objects() {
    let mut given =
        Args::from_keyval("driver=raw,file.driver=file,file.filename=a,,b=c,size=64K").unwrap();
    assert_eq!(given.required_str("driver").unwrap(), "raw");
    assert_eq!(given.optional_i64("size").unwrap(), Some(65536));
    let mut file = given.optional_object("file").unwrap().unwrap();
    assert_eq!(file.required_str("driver").unwrap(), "file");
    assert_eq!(file.required_str("filename").unwrap(), "a,b=c");
    file.finish().unwrap();
    given.finish().unwrap();
}

#[test]
fn words_for_booleans_are_read_from_the_command_line() {
    let mut given = Args::from_keyval("a=on,b=off,c=maybe").unwrap();
    assert_eq!(given.optional_bool("a").unwrap(), Some(true));
    assert_eq!(given.optional_bool("b").unwrap(), Some(false));
    assert_eq!(
        text(given.optional_bool("c")),
        "Parameter 'c' expects 'on' or 'off'"
    );
}

#[test]
fn options_may_leave_out_what_qemu_lets_them() {
    let mut given = Args::from_option("raw,file=f,", Some("driver")).unwrap();
    assert_eq!(given.required_str("driver").unwrap(), "raw");
    assert_eq!(given.required_str("file").unwrap(), "f");
    given.finish().unwrap();
    let given = Args::from_option("", Some("driver")).unwrap();
    given.finish().unwrap();
}

#[test]
fn numbers_are_read_from_the_command_line() {
    for (number, value) in [
        ("0", 0),
        ("-1", -1),
        ("2K", 2048),
        ("0x10", 16),
        ("0XfF", 255),
        ("-0x1", -1),
    ] {
        let mut given = Args::from_keyval(&format!("a={number}")).unwrap();
        assert_eq!(given.required_i64("a").unwrap(), value, "{number}");
    }
    for number in [
        "",
        "K",
        "0x",
        "0x+1",
        "0x-1",
        "0x8000000000000000",
        "010",
        "-010",
        "9223372036854775808",
        "9007199254740993K",
        "ä",
        "0ä",
    ] {
        let mut given = Args::from_keyval(&format!("a={number}")).unwrap();
        assert!(given.required_i64("a").is_err(), "{number}");
    }
}

#[test]
fn elements_of_lists_have_their_places_as_keys() {
    let mut given =
        Args::from_keyval("l.1=b,l.0=a,o.0.x=1,w.0=p,gap.0=a,gap.2=b,more.0=a,more.x=b").unwrap();
    let values = given.optional_list_of_string_or_object("l", "T").unwrap();
    let words: Vec<String> = values
        .unwrap()
        .into_iter()
        .map(|value| match value {
            StringOrObject::String(word) => word,
            StringOrObject::Object(_) => panic!("an object"),
        })
        .collect();
    assert_eq!(words, ["a", "b"]);
    let mut objects = given.required_object_list("o").unwrap();
    assert_eq!(objects[0].required_i64("x").unwrap(), 1);
    let words = given.optional_enum_list("w", &[("p", 7)]).unwrap();
    assert_eq!(words, Some(vec![7]));
    assert_eq!(
        text(given.optional_list("gap")),
        "Parameter 'gap.1' is missing"
    );
    assert_eq!(
        text(given.optional_list("more")),
        "Parameter 'more.1' is missing"
    );
}

#[test]
fn contradicting_keys_are_refused() {
    for given in [
        "a=1,a=2",
        "a=1,a.b=2",
        "a.b=1,a=2",
        ".=1",
        "a..b=1",
        "a",
        ",b=1",
    ] {
        assert!(Args::from_keyval(given).is_err(), "{given}");
    }
    let deep = format!("{}z=1", "a.".repeat(16));
    assert!(Args::from_keyval(&deep).is_err());
}

proptest! {
    #[test]
    fn no_option_text_is_fatal(given in "[a-c.,=0-9K]{0,60}") {
        if let Ok(mut args) = Args::from_keyval(&given) {
            let _ = args.optional_i64("a");
            let _ = args.optional_object("b");
            let _ = args.finish();
        }
    }
}
