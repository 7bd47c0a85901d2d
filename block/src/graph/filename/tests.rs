use std::path::PathBuf;

use super::*;
use crate::graph::Graph;
use crate::graph::tests::on_main;
use crate::options::{
    BlkdebugOptions, BlockdevOptions, BlockdevRef, CopyBeforeWriteOptions, FileOptions,
    NullCoOptions, RawOptions, SnapshotAccessOptions,
};
use crate::permissions::Perm;
use crate::{CbwPolicy, OnCbwError};

async fn add(graph: &Graph, name: &str, driver: DriverOptions, said: &[(&str, OptionValue)]) {
    let said = said.iter();
    let options = BlockdevOptions {
        node_name: Some(name.to_owned()),
        said: said
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect(),
        ..BlockdevOptions::new(driver)
    };
    graph.blockdev_add(options).await.unwrap();
}

fn below(name: &str) -> BlockdevRef {
    BlockdevRef::Name(name.to_owned())
}

fn null() -> DriverOptions {
    DriverOptions::NullCo(NullCoOptions {
        aio: false,
        size: 65536,
        latency_ns: 0,
        read_zeroes: false,
    })
}

fn raw(file: &str) -> DriverOptions {
    DriverOptions::Raw(RawOptions {
        file: below(file),
        offset: 0,
        size: None,
    })
}

fn blkdebug(image: &str) -> DriverOptions {
    DriverOptions::Blkdebug(BlkdebugOptions {
        image: below(image),
        config: None,
        align: 0,
        max_transfer: 0,
        opt_write_zero: 0,
        max_write_zero: 0,
        opt_discard: 0,
        max_discard: 0,
        inject_error: Vec::new(),
        set_state: Vec::new(),
        take_child_perms: Perm::NONE,
        unshare_child_perms: Perm::NONE,
    })
}

fn filename(graph: &Graph, name: &str) -> String {
    let node = graph.find_node(name).unwrap();
    graph.info(&node).unwrap().filename
}

#[test]
fn a_node_that_shows_a_file_is_called_after_it_and_others_after_their_options() {
    on_main(|graph| async move {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        let file = path.display().to_string();
        let options = FileOptions {
            filename: path,
            locking: None,
            host_device: false,
            bitmap_file: None,
        };
        add(&graph, "f", DriverOptions::File(options), &[]).await;
        add(&graph, "r", raw("f"), &[]).await;
        assert_eq!(filename(&graph, "f"), file);
        assert_eq!(filename(&graph, "r"), file);

        let of_file = format!("{{\"driver\": \"file\", \"filename\": \"{file}\"}}");
        add(&graph, "rr", raw("r"), &[]).await;
        let of_raw = format!("{{\"driver\": \"raw\", \"file\": {of_file}}}");
        let shown = format!("json:{{\"driver\": \"raw\", \"file\": {of_raw}}}");
        assert_eq!(filename(&graph, "rr"), shown);

        add(&graph, "part", raw("f"), &[("offset", OptionValue::Int(0))]).await;
        let shown = format!("json:{{\"offset\": 0, \"driver\": \"raw\", \"file\": {of_file}}}");
        assert_eq!(filename(&graph, "part"), shown);

        add(&graph, "d", blkdebug("f"), &[]).await;
        assert_eq!(filename(&graph, "d"), format!("blkdebug::{file}"));
        add(&graph, "rd", raw("d"), &[]).await;
        assert_eq!(filename(&graph, "rd"), format!("blkdebug::{file}"));
        let rule = [
            ("inject-error.0.event", OptionValue::Text("none".to_owned())),
            ("inject-error.0.once", OptionValue::Bool(true)),
            ("align", OptionValue::Int(512)),
        ];
        add(&graph, "dd", blkdebug("f"), &rule).await;
        let shown = format!(
            "json:{{\"inject-error.0.once\": true, \"image\": {of_file}, \"driver\": \"blkdebug\", \
             \"inject-error.0.event\": \"none\", \"align\": 512}}"
        );
        assert_eq!(filename(&graph, "dd"), shown);
    });
}

#[test]
fn filters_of_jobs_and_snapshots_have_the_name_of_what_they_show() {
    on_main(|graph| async move {
        add(&graph, "n", null(), &[("size", OptionValue::Int(65536))]).await;
        add(&graph, "plain", null(), &[]).await;
        assert_eq!(filename(&graph, "plain"), "null-co://");
        let named = "json:{\"driver\": \"null-co\", \"size\": 65536}";
        assert_eq!(filename(&graph, "n"), named);
        let filter = DriverOptions::CopyBeforeWrite(CopyBeforeWriteOptions {
            file: below("n"),
            target: below("plain"),
            bitmap: None,
            policy: CbwPolicy {
                on_error: OnCbwError::default(),
                timeout: None,
            },
        });
        add(&graph, "c", filter, &[]).await;
        let access = SnapshotAccessOptions { file: below("c") };
        add(&graph, "s", DriverOptions::SnapshotAccess(access), &[]).await;
        assert_eq!(filename(&graph, "c"), named);
        assert_eq!(filename(&graph, "s"), named);
        add(&graph, "r", raw("s"), &[]).await;
        assert!(filename(&graph, "r").contains("{\"driver\": \"snapshot-access\", \"file\": "));
    });
}

#[test]
fn a_name_of_many_nodes_is_cut_and_says_so() {
    on_main(|graph| async move {
        add(&graph, "n0", null(), &[("size", OptionValue::Int(65536))]).await;
        for number in 1..90 {
            let below = format!("n{}", number - 1);
            let said = [
                ("offset", OptionValue::Int(0)),
                ("size", OptionValue::Int(4096)),
            ];
            add(&graph, &format!("n{number}"), raw(&below), &said).await;
        }
        let long = filename(&graph, "n89");
        assert_eq!(long.len(), MAX_LEN);
        assert!(long.ends_with("..."), "{long}");
        assert!(filename(&graph, "n9").ends_with("}}}"));
    });
}

#[test]
fn names_in_json_are_ascii() {
    let name = PathBuf::from("ü€😀\u{7}\"\\\n\u{7f}");
    assert_eq!(
        text(&name.to_string_lossy()),
        "\"\\u00FC\\u20AC\\uD83D\\uDE00\\u0007\\\"\\\\\\n\\u007F\""
    );
}

#[test]
fn where_the_file_is_that_a_header_names() {
    let cases = [
        ("b.qcow2", "/d/t.qcow2", Some("/d/b.qcow2")),
        ("../b", "/d/t", Some("/d/../b")),
        ("/abs/b", "/d/t", Some("/abs/b")),
        ("nbd://host", "/d/t", Some("nbd://host")),
        ("b", "t", Some("b")),
        ("a/b:c", "/d/t", Some("/d/a/b:c")),
        ("b", "json:{}", None),
    ];
    for (named, file, full) in cases {
        let found = crate::graph::info::full_name(named, file);
        assert_eq!(found.as_deref(), full, "{named} in {file}");
    }
}
