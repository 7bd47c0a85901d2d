//! Objects over QMP: making, changing, deleting, and each mistake's text.

use block::runtime::spawn_local;
use serde_json::{Value, json};

use super::super::parse_object;
use super::{Client, with_monitor};

fn group(extra: Value) -> Value {
    let mut arguments = json!({"qom-type": "throttle-group", "id": "g"});
    for (name, value) in extra.as_object().unwrap() {
        arguments[name] = value.clone();
    }
    arguments
}

#[test]
fn every_mistake_with_an_object_has_qemus_text() {
    let add = |arguments: Value, text: &'static str| ("object-add", arguments, text);
    let limits =
        |limits: Value, text: &'static str| ("object-add", group(json!({"limits": limits})), text);
    let set = |property: &str, value: Value, text: &'static str| {
        let arguments = json!({"path": "/objects/there", "property": property, "value": value});
        ("qom-set", arguments, text)
    };
    let cases = [
        add(json!({"id": "o"}), "Parameter 'qom-type' is missing"),
        add(
            json!({"qom-type": "nope"}),
            "Parameter 'qom-type' does not accept value 'nope'",
        ),
        add(
            json!({"qom-type": "throttle-group"}),
            "Parameter 'id' is missing",
        ),
        add(
            json!({"qom-type": "throttle-group", "id": "1bad"}),
            "Parameter 'id' expects an identifier",
        ),
        add(
            json!({"qom-type": "rng-random", "id": "r"}),
            "invalid object type: rng-random",
        ),
        add(
            json!({"qom-type": "secret", "id": "s", "data": "x"}),
            "Objects of type 'secret' are not supported here; there are 'iothread' and \
             'throttle-group'",
        ),
        add(
            json!({"qom-type": "iothread", "id": "there"}),
            "attempt to add duplicate property 'there' to object (type 'container')",
        ),
        add(
            json!({"qom-type": "iothread", "id": "i", "poll-max-ns": -1}),
            "poll-max-ns value must be in range [0, 9223372036854775807]",
        ),
        add(
            json!({"qom-type": "iothread", "id": "i", "thread-pool-min": 65}),
            "bad thread-pool-min/thread-pool-max values",
        ),
        add(
            group(json!({"bogus": 1})),
            "Parameter 'bogus' is unexpected",
        ),
        add(
            group(json!({"limits": 5})),
            "Invalid parameter type for 'limits', expected: object",
        ),
        add(
            group(json!({"x-bps-total": -5})),
            "Property values cannot be negative",
        ),
        add(
            json!({"qom-type": "iothread", "id": "i", "thread-pool-max": 1_u64 << 31}),
            "bad thread-pool-min/thread-pool-max values",
        ),
        add(
            json!({"qom-type": "throttle-group", "id": "type"}),
            "attempt to add duplicate property 'type' to object (type 'container')",
        ),
        add(
            group(json!({"x-bps-total-max-length": -1})),
            "Property values cannot be negative",
        ),
        add(
            group(json!({"x-bps-total-max-length": 1_u64 << 32})),
            "x-bps-total-max-length value must be in therange [0, 4294967295]",
        ),
        limits(
            json!({"bps-total": "a"}),
            "Invalid parameter type for 'limits.bps-total', expected: integer",
        ),
        limits(
            json!({"bps-total": 10, "bps-read": 10}),
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
        limits(
            json!({"bps-total": -1}),
            "bps/iops/max values must be within [0, 1000000000000000]",
        ),
        limits(json!({"nope": 1}), "Parameter 'limits.nope' is unexpected"),
        limits(
            json!({"iops-total-max-length": -1}),
            "burst length set without burst rate",
        ),
        limits(
            json!({"iops-total": 5, "iops-total-max": 10, "iops-total-max-length": -1}),
            "burst length too high for this burst rate",
        ),
        limits(
            json!({"iops-total-max-length": 1_u64 << 32}),
            "iops-total-max-length value must be in the range [0, 4294967295]",
        ),
        limits(
            json!({"iops-size": -1}),
            "iops size requires an iops value to be set",
        ),
        set(
            "limits",
            json!(null),
            "Invalid parameter type for 'limits', expected: object",
        ),
        set("nope", json!(1), "Property 'throttle-group.nope' not found"),
        set(
            "type",
            json!("x"),
            "Property 'throttle-group.type' is not writable",
        ),
        set(
            "x-bps-read",
            json!(1),
            "Property cannot be set after initialization",
        ),
        (
            "qom-set",
            json!({"path": "/objects/there", "property": "limits"}),
            "Parameter 'value' is missing",
        ),
        (
            "qom-get",
            json!({"path": "/", "property": "limits"}),
            "Property 'container.limits' not found",
        ),
        (
            "qom-get",
            json!({"path": "/there", "property": "limits"}),
            "Device '/there' not found",
        ),
        ("qom-list", json!({"path": ""}), "Path '' is ambiguous"),
        (
            "qom-list-properties",
            json!({"typename": "nope"}),
            "Class 'nope' not found",
        ),
        (
            "object-del",
            json!({"id": "nope"}),
            "object 'nope' not found",
        ),
    ];
    with_monitor(
        |monitor| {
            let there = parse_object("throttle-group,id=there").unwrap();
            monitor.objects().add(there).unwrap();
        },
        move |path| {
            let mut client = Client::negotiated(path);
            for (command, arguments, text) in cases {
                let shown = arguments.to_string();
                assert_eq!(
                    client.refusal(command, arguments),
                    text,
                    "{command} {shown}"
                );
            }
            let missing = client.ask_with("qom-get", json!({"path": "no", "property": "x"}));
            assert_eq!(missing["error"]["class"], "DeviceNotFound");
            // Nothing was made by what was refused.
            let list = client.ask_with("qom-list", json!({"path": "/objects"}));
            assert_eq!(
                list["return"],
                json!([
                    {"name": "type", "type": "string"},
                    {"name": "there", "type": "child<throttle-group>"}
                ])
            );
        },
    );
}

#[test]
fn limits_are_changed_one_by_one_and_only_all_together() {
    with_monitor(
        |monitor| {
            let text = "throttle-group,id=g,limits.bps-read=50,x-iops-write=7";
            monitor.objects().add(parse_object(text).unwrap()).unwrap();
        },
        |path| {
            let mut client = Client::negotiated(path);
            let get = |client: &mut Client, name: &str| {
                let arguments = json!({"path": "g", "property": "limits"});
                client.ask_with("qom-get", arguments)["return"][name].clone()
            };
            let set = |value: Value| json!({"path": "g", "property": "limits", "value": value});
            client.ask_with(
                "qom-set",
                set(json!({"bps-read-max": 100, "bps-read-max-length": 7})),
            );
            assert_eq!(get(&mut client, "bps-read"), 50);
            assert_eq!(get(&mut client, "bps-read-max-length"), 7);
            assert_eq!(get(&mut client, "iops-write"), 7);
            assert_eq!(
                client.refusal("qom-set", set(json!({"iops-write": 9, "bps-read": 0}))),
                "bps_max/iops_max require corresponding bps/iops values"
            );
            assert_eq!(get(&mut client, "iops-write"), 7);
            let single = json!({"path": "/objects/g", "property": "x-bps-read"});
            assert_eq!(client.ask_with("qom-get", single)["return"], 50);
        },
    );
}

#[test]
fn a_group_with_nodes_and_an_iothread_with_users_cannot_be_deleted() {
    with_monitor(
        |monitor| {
            for text in [
                "throttle-group,id=g",
                "{'qom-type': 'iothread', 'id': 'io', 'poll-max-ns': 0}",
            ] {
                monitor.objects().add(parse_object(text).unwrap()).unwrap();
            }
            assert!(monitor.objects().iothread("g").is_none());
            let user = monitor.objects().iothread("io").unwrap();
            assert_eq!(user.name(), "io");
            let monitor = std::rc::Rc::clone(monitor);
            spawn_local(async move {
                // The use ends when the client has been refused once.
                while monitor.graph.find_node("refused").is_err() {
                    block::runtime::yield_now().await;
                }
                drop(user);
            })
            .detach();
        },
        |path| {
            let mut client = Client::negotiated(path);
            let null = |name: &str| json!({"driver": "null-co", "node-name": name});
            let node = |name: &str| json!({"node-name": name});
            let throttle = |group: &str| {
                json!({
                    "driver": "throttle", "node-name": "t", "throttle-group": group, "file": "n"
                })
            };
            client.ask_with("blockdev-add", null("n"));
            assert_eq!(
                client.refusal("blockdev-add", throttle("io")),
                "Throttle group 'io' does not exist"
            );
            client.ask_with("blockdev-add", throttle("g"));
            for id in ["g", "io"] {
                assert_eq!(
                    client.refusal("object-del", json!({"id": id})),
                    format!("object '{id}' is in use, can not be deleted")
                );
            }
            client.ask_with("blockdev-add", null("refused"));
            client.ask_with("blockdev-del", node("t"));
            for id in ["g", "io"] {
                assert_eq!(
                    client.ask_with("object-del", json!({"id": id})),
                    json!({"return": {}})
                );
            }
        },
    );
}

#[test]
fn objects_of_the_command_line_are_read_as_json_and_as_keys() {
    let keys = parse_object("throttle-group,id=g,limits.iops-total=10").unwrap();
    let json = "{'qom-type': 'throttle-group', 'id': 'g', 'limits': {'iops-total': 10}}";
    assert_eq!(parse_object(json).unwrap(), keys);
    assert_eq!(
        parse_object("qom-type=throttle-group,id=g,limits.iops-total=10").unwrap(),
        keys
    );
    for (text, message) in [
        ("", "Parameter 'qom-type' is missing"),
        ("throttle-group", "Parameter 'id' is missing"),
        ("id=g", "Parameter 'qom-type' is missing"),
        (
            "iothread,id=i,poll-max-ns=x",
            "Invalid parameter type for 'poll-max-ns', expected: integer",
        ),
        ("{}", "Parameter 'qom-type' is missing"),
        ("{'id': 'g'} 1", "Expecting one JSON object"),
    ] {
        assert_eq!(parse_object(text).unwrap_err().desc, message, "{text}");
    }
}
