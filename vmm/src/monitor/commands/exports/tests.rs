//! Options of exports and servers, in both forms.

use serde_json::json;

use super::*;

fn start(arguments: Value) -> Result<NbdServerArgs, String> {
    let Value::Object(members) = arguments else {
        panic!("arguments are an object");
    };
    nbd_server_args(Args::new(members), AddressForm::Nested).map_err(|error| error.desc)
}

fn add(arguments: Value) -> Result<ExportArgs, String> {
    let Value::Object(members) = arguments else {
        panic!("arguments are an object");
    };
    export_args(Args::new(members)).map_err(|error| error.desc)
}

#[test]
fn both_forms_of_an_address_mean_the_same() {
    let nested = start(json!({"addr": {"type": "unix", "data": {"path": "/a"}}}));
    let flat = parse_nbd_server("addr.type=unix,addr.path=/a").unwrap();
    assert_eq!(nested.as_ref(), Ok(&flat));
    assert_eq!(flat.max_connections, 100);
    let nested = start(json!({
        "addr": {"type": "inet", "data": {"host": "h", "port": "1", "to": 7, "ipv4": true}},
        "max-connections": 1,
    }));
    let flat = parse_nbd_server(
        "addr.type=inet,addr.host=h,addr.port=1,addr.to=7,addr.ipv4=on,max-connections=1",
    );
    assert_eq!(nested.unwrap(), flat.unwrap());
    let json = r#"{"addr": {"type": "unix", "path": "/a"}}"#;
    assert!(parse_nbd_server(json).is_ok());
}

#[test]
fn mistakes_in_addresses_are_named_in_qemus_words() {
    let inet = |data: Value| json!({"addr": {"type": "inet", "data": data}});
    for (arguments, text) in [
        (json!({}), "Parameter 'addr' is missing"),
        (
            json!({"addr": "x"}),
            "Invalid parameter type for 'addr', expected: object",
        ),
        (
            json!({"addr": {"type": "unix"}}),
            "Parameter 'addr.data' is missing",
        ),
        (
            json!({"addr": {"type": "unix", "path": "/x"}}),
            "Parameter 'addr.data' is missing",
        ),
        (
            json!({"addr": {"type": "unix", "data": {}}}),
            "Parameter 'addr.data.path' is missing",
        ),
        (
            json!({"addr": {"type": "carrier-pigeon", "data": {}}}),
            "Parameter 'type' does not accept value 'carrier-pigeon'",
        ),
        (
            inet(json!({"port": "1"})),
            "Parameter 'addr.data.host' is missing",
        ),
        (
            inet(json!({"host": "h", "port": 1})),
            "Invalid parameter type for 'addr.data.port', expected: string",
        ),
        (
            inet(json!({"host": "h", "port": "1", "foo": 1})),
            "Parameter 'addr.data.foo' is unexpected",
        ),
        (
            inet(json!({"host": "h", "port": "1", "to": 70000})),
            "Parameter 'to' expects uint16_t",
        ),
        (
            json!({"addr": {"type": "fd", "data": {"str": "7"}}}),
            "only QEMU supports file descriptor passing",
        ),
    ] {
        assert_eq!(
            start(arguments.clone()),
            Err(text.to_owned()),
            "{arguments}"
        );
    }
}

#[test]
fn mistakes_in_exports_are_named_in_qemus_words() {
    for (arguments, text) in [
        (json!({}), "Parameter 'type' is missing"),
        (
            json!({"type": "fax"}),
            "Parameter 'type' does not accept value 'fax'",
        ),
        (json!({"type": "nbd"}), "Parameter 'id' is missing"),
        (
            json!({"type": "nbd", "id": "e"}),
            "Parameter 'node-name' is missing",
        ),
        (
            json!({"type": "nbd", "id": "e", "node-name": "n", "bitmaps": [1]}),
            "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr",
        ),
        (
            json!({"type": "nbd", "id": "e", "node-name": "n", "bitmaps": [{"node": "n"}]}),
            "Parameter 'bitmaps[0].name' is missing",
        ),
        (
            json!({"type": "nbd", "id": "e", "node-name": "n", "unknown": 1}),
            "Parameter 'unknown' is unexpected",
        ),
    ] {
        let error = add(arguments.clone()).unwrap_err();
        assert_eq!(error, text, "{arguments}");
    }
}

#[test]
fn exports_are_read_from_the_command_line() {
    let export = parse_export("nbd,id=e,node-name=n,name=x,writable=on").unwrap();
    assert_eq!(export.id(), "e");
    assert!(export.writable);
    let ExportKind::Nbd { name, .. } = export.kind;
    assert_eq!(name.as_deref(), Some("x"));
    assert!(parse_export("type=nbd,id=e,node-name=n").is_ok());
}
