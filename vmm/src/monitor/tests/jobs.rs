//! Jobs over QMP, on disks without storage.

use std::path::Path;

use serde_json::{Value, json};

use super::{Client, with_monitor};

/// A client of a monitor with the nodes `a` and `b`, and a slow mirror `j0` if
/// asked for.
fn client_with_nodes(path: &Path) -> Client {
    let mut client = Client::negotiated(path);
    for name in ["a", "b"] {
        let options = json!({
            "driver": "null-co", "node-name": name, "size": 1 << 20, "read-zeroes": true
        });
        assert_eq!(
            client.ask_with("blockdev-add", options),
            json!({"return": {}})
        );
    }
    client
}

fn mirror(client: &mut Client, extra: Value) {
    let mut arguments = json!({"job-id": "j0", "device": "a", "target": "b", "sync": "full"});
    for (name, value) in extra.as_object().unwrap() {
        arguments[name] = value.clone();
    }
    assert_eq!(
        client.ask_with("blockdev-mirror", arguments),
        json!({"return": {}})
    );
}

fn statuses(events: &[Value]) -> Vec<&str> {
    let statuses = events.iter().filter_map(|e| e["data"]["status"].as_str());
    statuses.collect()
}

#[test]
fn what_a_command_causes_is_announced_before_its_reply() {
    with_monitor(
        |_| (),
        |path| {
            let mut client = client_with_nodes(path);
            mirror(
                &mut client,
                json!({"auto-finalize": false, "auto-dismiss": false}),
            );
            assert_eq!(statuses(&client.events[..2]), ["created", "running"]);
            client.wait_for("BLOCK_JOB_READY");
            client.ask_with("job-complete", json!({"id": "j0"}));
            client.wait_for("BLOCK_JOB_PENDING");

            client.events.clear();
            client.ask_with("job-finalize", json!({"id": "j0"}));
            let names: Vec<&Value> = client.events.iter().map(|e| &e["event"]).collect();
            assert_eq!(names, ["BLOCK_JOB_COMPLETED", "JOB_STATUS_CHANGE"]);
            assert_eq!(statuses(&client.events), ["concluded"]);

            client.events.clear();
            client.ask_with("job-dismiss", json!({"id": "j0"}));
            assert_eq!(statuses(&client.events), ["null"]);
            assert_eq!(client.ask("query-jobs"), json!({"return": []}));
        },
    );
}

#[test]
fn both_families_of_commands_act_on_the_same_job() {
    with_monitor(
        |_| (),
        |path| {
            let mut client = client_with_nodes(path);
            mirror(&mut client, json!({"copy-mode": "write-blocking"}));
            client.wait_for("BLOCK_JOB_READY");
            client.ask_with("job-pause", json!({"id": "j0"}));
            assert_eq!(
                client.refusal("block-job-pause", json!({"device": "j0"})),
                "Job is already paused"
            );
            assert_eq!(
                client.refusal("block-job-cancel", json!({"device": "j0"})),
                "The block job for device 'j0' is currently paused"
            );
            client.ask_with("block-job-resume", json!({"device": "j0"}));
            client.ask_with("block-job-set-speed", json!({"device": "j0", "speed": 5}));
            let jobs = client.ask("query-block-jobs");
            assert_eq!(jobs["return"][0]["speed"], 5);
            client.ask_with("job-cancel", json!({"id": "j0"}));
            client.wait_for("BLOCK_JOB_CANCELLED");
        },
    );
}

#[test]
fn a_mirror_is_switched_to_write_blocking_and_not_back() {
    with_monitor(
        |_| (),
        |path| {
            let mut client = client_with_nodes(path);
            mirror(&mut client, json!({}));
            client.wait_for("BLOCK_JOB_READY");
            let change = |mode: &str| json!({"id": "j0", "type": "mirror", "copy-mode": mode});
            for _ in 0..2 {
                assert_eq!(
                    client.ask_with("block-job-change", change("write-blocking")),
                    json!({"return": {}})
                );
            }
            client.refusal("block-job-change", change("background"));
            assert_eq!(
                client.refusal("block-job-change", json!({"id": "j0", "type": "mirror"})),
                "Parameter 'copy-mode' is missing"
            );
            client.refusal("block-job-change", json!({"id": "j0", "type": "backup"}));
            let unknown = json!({"id": "no", "type": "mirror", "copy-mode": "background"});
            let reply = client.ask_with("block-job-change", unknown);
            assert_eq!(reply["error"]["class"], "DeviceNotActive");
        },
    );
}

#[test]
fn ill_formed_mirrors_are_refused_and_leave_no_job() {
    with_monitor(
        |_| (),
        |path| {
            let mut client = client_with_nodes(path);
            let cases = [
                (json!({}), "Parameter 'device' is missing"),
                (json!({"device": "a"}), "Parameter 'target' is missing"),
                (
                    json!({"device": "a", "target": "b"}),
                    "Parameter 'sync' is missing",
                ),
                (
                    json!({"device": "a", "target": "b", "sync": "zz"}),
                    "Parameter 'sync' does not accept value 'zz'",
                ),
                (
                    json!({"device": "a", "target": "b", "sync": "full"}),
                    "Invalid job ID ''",
                ),
                (
                    json!({"device": "a", "target": "a", "sync": "full", "job-id": "j"}),
                    "Can't mirror node into itself",
                ),
                (
                    json!({"device": "no", "target": "b", "sync": "full", "job-id": "j"}),
                    "Cannot find device='no' nor node-name='no'",
                ),
                (
                    json!({"device": "a", "target": "no", "sync": "full", "job-id": "j"}),
                    "Cannot find device='no' nor node-name='no'",
                ),
                (
                    json!({"device": "a", "target": "b", "sync": "full", "granularity": -1}),
                    "Parameter 'granularity' expects uint32_t",
                ),
            ];
            for (arguments, text) in cases {
                assert_eq!(client.refusal("blockdev-mirror", arguments), text);
            }
            assert_eq!(client.ask("query-jobs"), json!({"return": []}));
        },
    );
}

#[test]
fn a_job_without_an_id_is_called_like_the_device_whichever_name_is_given() {
    with_monitor(
        |monitor| {
            let driver = block::drivers::null::NullDriver::new(block::NullCoOptions {
                aio: false,
                size: 1 << 20,
                latency_ns: 0,
                read_zeroes: true,
            });
            let graph = &monitor.graph;
            let node = graph
                .add_node(Some("disk"), Box::new(driver), Default::default())
                .unwrap();
            let idle = block::Permissions::IDLE;
            graph.attach("vda", &node, idle, None).unwrap();
        },
        |path| {
            let mut client = client_with_nodes(path);
            for device in ["vda", "disk"] {
                let arguments = json!({"device": device, "target": "b", "sync": "full"});
                let started = client.ask_with("blockdev-mirror", arguments);
                assert_eq!(started, json!({"return": {}}));
                let jobs = client.ask("query-jobs");
                assert_eq!(jobs["return"][0]["id"], "vda", "{device}");
                client.ask_with("job-cancel", json!({"id": "vda"}));
                client.wait_for("BLOCK_JOB_CANCELLED");
                while client.ask("query-jobs") != json!({"return": []}) {}
            }
        },
    );
}
