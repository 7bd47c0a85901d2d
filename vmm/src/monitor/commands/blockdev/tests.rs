use serde_json::{Value, json};

use std::path::PathBuf;

use block::{FileOptions, NullCoOptions, RawOptions};

use super::*;

fn read(value: Value) -> Result<BlockdevOptions, QmpError> {
    let Value::Object(members) = value else {
        panic!("options are an object");
    };
    blockdev_options(Args::new(members))
}

#[test]
fn every_mistake_has_qemus_text() {
    let file = |options: Value| json!({"driver": "raw", "node-name": "a", "file": options});
    let null = |name: &str, value: Value| {
        let mut options = json!({"driver": "null-co", "node-name": "a"});
        options[name] = value;
        options
    };
    let cases = [
        (json!({"node-name": "x"}), "Parameter 'driver' is missing"),
        (
            json!({"driver": "floppy9", "node-name": "x"}),
            "Parameter 'driver' does not accept value 'floppy9'",
        ),
        (
            json!({"driver": null}),
            "Invalid parameter type for 'driver', expected: string",
        ),
        (
            json!({"driver": "null-co"}),
            "'node-name' must be specified for the root node",
        ),
        (
            json!({"driver": "file", "node-name": "x"}),
            "Parameter 'filename' is missing",
        ),
        (
            json!({"driver": "raw", "node-name": "x"}),
            "Parameter 'file' is missing",
        ),
        (
            file(json!({"driver": "file"})),
            "Parameter 'file.filename' is missing",
        ),
        (
            file(json!({"driver": "file", "filename": "x", "bla": 1})),
            "Parameter 'file.bla' is unexpected",
        ),
        (
            file(json!(5)),
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (file(json!({})), "Parameter 'file.driver' is missing"),
        (
            file(json!({"driver": "zz"})),
            "Parameter 'driver' does not accept value 'zz'",
        ),
        (
            file(json!({"driver": 7})),
            "Invalid parameter type for 'file.driver', expected: string",
        ),
        (
            file(json!({"driver": "file", "filename": ""})),
            "The 'file' block driver requires a file name",
        ),
        (
            null("size", json!("1M")),
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            null("size", json!(-1)),
            "Parameter 'size' expects a non-negative number below 2^64",
        ),
        (
            null("latency-ns", json!(1_u64 << 63)),
            "latency-ns is invalid",
        ),
        (
            null("colour", json!("red")),
            "Parameter 'colour' is unexpected",
        ),
        (
            null("read-only", json!(1)),
            "Invalid parameter type for 'read-only', expected: boolean",
        ),
        (
            null("cache", json!({"direct": "x"})),
            "Invalid parameter type for 'cache.direct', expected: boolean",
        ),
        (
            null("discard", json!("maybe")),
            "Parameter 'discard' does not accept value 'maybe'",
        ),
        (
            json!({"driver": "file", "node-name": "x", "filename": "y", "aio": "native"}),
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ),
    ];
    for (options, text) in cases {
        let shown = options.to_string();
        assert_eq!(read(options).unwrap_err().desc, text, "{shown}");
    }
}

#[test]
fn json_and_key_value_say_the_same() {
    let from_json = read(json!({
        "driver": "raw", "node-name": "r", "read-only": true, "offset": 512,
        "cache": {"direct": true}, "discard": "unmap", "detect-zeroes": "unmap",
        "file": {
            "driver": "file", "filename": "a,b", "locking": "off", "auto-read-only": true
        },
    }));
    let from_text = parse_blockdev(
        "driver=raw,node-name=r,read-only=on,offset=512,cache.direct=on,discard=unmap,\
         detect-zeroes=unmap,file.driver=file,file.filename=a,,b,file.locking=off,\
         file.auto-read-only=on",
    );
    let file = BlockdevOptions {
        auto_read_only: Some(true),
        ..BlockdevOptions::new(DriverOptions::File(FileOptions {
            filename: PathBuf::from("a,b"),
            locking: Some(false),
            host_device: false,
            bitmap_file: None,
        }))
    };
    let raw = DriverOptions::Raw(RawOptions {
        file: BlockdevRef::Inline(Box::new(file)),
        offset: 512,
        size: None,
    });
    let expected = BlockdevOptions {
        node_name: Some("r".to_owned()),
        read_only: Some(true),
        cache: CacheChoice {
            direct: Some(true),
            no_flush: None,
        },
        discard: Some(DiscardMode::Unmap),
        detect_zeroes: DetectZeroes::Unmap,
        said: vec![("offset".to_owned(), OptionValue::Int(512))],
        ..BlockdevOptions::new(raw)
    };
    assert_eq!(from_json.unwrap(), expected);
    assert_eq!(from_text.unwrap(), expected);
}

#[test]
fn a_null_node_has_a_size_of_its_own() {
    let options = read(json!({"driver": "null-co", "node-name": "n"})).unwrap();
    let expected = NullCoOptions {
        aio: false,
        size: 1 << 30,
        latency_ns: 0,
        read_zeroes: false,
    };
    assert_eq!(options.driver, DriverOptions::NullCo(expected));
    let options = read(json!({"driver": "null-aio", "node-name": "n"})).unwrap();
    let expected = NullCoOptions {
        aio: true,
        ..expected
    };
    assert_eq!(options.driver, DriverOptions::NullCo(expected));
}

#[test]
fn what_tells_a_node_from_others_is_kept_as_it_was_said() {
    let said = |options: Value| read(options).unwrap().said;
    let null = json!({"driver": "null-co", "node-name": "n", "latency-ns": 5, "size": 512});
    assert_eq!(said(null), [("size".to_owned(), OptionValue::Int(512))]);
    let debug = json!({
        "driver": "blkdebug", "node-name": "b", "align": 512,
        "inject-error": [{"event": "none"}, {"event": "pwritev", "once": true}],
        "image": {"driver": "null-co", "size": 7},
    });
    let text = |text: &str| OptionValue::Text(text.to_owned());
    let expected = [
        ("align", OptionValue::Int(512)),
        ("inject-error.0.event", text("none")),
        ("inject-error.1.event", text("pwritev")),
        ("inject-error.1.once", OptionValue::Bool(true)),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value));
    assert_eq!(said(debug), expected);
    let line = parse_blockdev("raw,node-name=r,file=x,size=1K").unwrap();
    assert_eq!(line.said, [("size".to_owned(), OptionValue::Int(1024))]);
}

#[test]
fn the_command_line_takes_one_json_object() {
    let text = "{'driver': 'null-co', 'node-name': 'n'}";
    assert!(parse_blockdev(text).is_ok());
    for bad in ["{", "{}{}", "{\"driver\" 1}", "[]", "null-co"] {
        assert!(parse_blockdev(bad).is_err(), "{bad}");
    }
}

#[test]
fn rules_of_blkdebug_are_read_and_their_mistakes_named() {
    let with = |name: &str, value: Value| {
        let mut options = json!({"driver": "blkdebug", "node-name": "b", "image": "n"});
        options[name] = value;
        options
    };
    let rule = |rule: Value| with("inject-error", json!([{"event": "none"}, rule]));
    let cases = [
        (
            with("align", json!(-1)),
            "Parameter 'align' expects a non-negative number below 2^64",
        ),
        (
            with("max-transfer", json!(1_u64 << 31)),
            "Parameter 'max-transfer' expects int32_t",
        ),
        (
            with("inject-error", json!({})),
            "Invalid parameter type for 'inject-error', expected: array",
        ),
        (
            with("inject-error", json!([])),
            "Block protocol 'blkdebug' doesn't support the option 'inject-error'",
        ),
        (
            rule(json!(5)),
            "Invalid parameter type for 'inject-error[1]', expected: object",
        ),
        (
            rule(json!({})),
            "Parameter 'inject-error[1].event' is missing",
        ),
        (
            rule(json!({"event": "zz"})),
            "Parameter 'event' does not accept value 'zz'",
        ),
        (
            rule(json!({"event": "none", "iotype": "zz"})),
            "Parameter 'iotype' does not accept value 'zz'",
        ),
        (
            rule(json!({"event": "none", "x": 1})),
            "Parameter 'inject-error[1].x' is unexpected",
        ),
        (
            with("set-state", json!([{"event": "none"}])),
            "Parameter 'set-state[0].new_state' is missing",
        ),
        (
            with("take-child-perms", json!(["all"])),
            "Parameter 'null' does not accept value 'all'",
        ),
    ];
    for (options, text) in cases {
        let shown = options.to_string();
        assert_eq!(read(options).unwrap_err().desc, text, "{shown}");
    }
    let from_json = read(rule(json!({
        "event": "write_aio", "errno": 28, "sector": -1, "once": true, "delay-ns": 7
    })));
    let from_text = parse_blockdev(
        "driver=blkdebug,node-name=b,image=n,inject-error.0.event=none,\
         inject-error.1.event=write_aio,inject-error.1.errno=28,inject-error.1.sector=-1,\
         inject-error.1.once=on,inject-error.1.delay-ns=7",
    );
    assert_eq!(from_json.unwrap(), from_text.unwrap());
}
