//! What has to be durable before what refers to it.

use std::sync::Arc;

use imago::storage::drivers::CommonStorageHelper;

use super::super::file::GrowingFile;
use super::super::order::WriteOrder;
use super::super::read_header;
use super::check::Image;
use super::on_main;
use super::recorder::{Event, Recorder};
use super::requests::{CLUSTER, LAYOUT, SIZE, filled, image, options, sectors, write};
use crate::buffer::AlignedBuffer;
use crate::driver::ChildRole;
use crate::error::IoOp;
use crate::node::Child;
use crate::options::{BackingRef, BlockdevOptions, BlockdevRef, DriverOptions, Qcow2Options};
use crate::runtime::spawn_local;
use crate::test_storage::{Match, TestStorage};

const L1: usize = 3 * CLUSTER as usize;
const REFBLOCK: u64 = 2 * CLUSTER;

fn entry(content: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(content[at..at + 8].try_into().unwrap())
}

/// Where the first second level table is.
fn first_l2(content: &[u8]) -> u64 {
    entry(content, L1) & 0x00ff_ffff_ffff_fe00
}

fn backing(name: &str) -> BackingRef {
    BackingRef::Node(BlockdevRef::Name(name.to_owned()))
}

#[test]
fn a_cluster_that_was_copied_as_a_whole_is_durable_before_a_table_refers_to_it() {
    on_main(|graph| async move {
        let (recorder, node) = image(&graph, "a", BackingRef::None).await;
        write(&node, 0, CLUSTER, 1).await;
        node.flush().await.unwrap();
        let content = recorder.content();
        let l2 = first_l2(&content);

        let recorder = Recorder::new(content.clone(), 1);
        let below = graph
            .add_node(Some("below"), recorder.driver(), options())
            .unwrap();
        let header = read_header(&below, false, None).await.unwrap();
        let file = GrowingFile::new(Child::new(ChildRole::File, below));
        let order = WriteOrder::load(&header, &file, None).await.unwrap();
        let helper = CommonStorageHelper::default();
        let cluster = |at: u64| {
            let iov = AlignedBuffer::new(CLUSTER as usize).io_vec(CLUSTER as usize);
            iov.copy_from(0, &content[at as usize..(at + CLUSTER) as usize]);
            iov
        };
        // The count of the new cluster is written early, by somebody else's turn.
        let counts = cluster(REFBLOCK);
        order.write(&file, &helper, REFBLOCK, counts).await.unwrap();
        let copy = content.len() as u64;
        let data = filled(CLUSTER, 7);
        order.write(&file, &helper, copy, data).await.unwrap();
        let copied = recorder.position();
        order.write(&file, &helper, l2, cluster(l2)).await.unwrap();

        let events = recorder.events();
        let entered = events
            .iter()
            .position(|event| matches!(event, Event::Write { offset, .. } if *offset as u64 == l2))
            .expect("the table was written");
        let durable = events[..entered]
            .iter()
            .any(|event| matches!(event, Event::Flush { covers } if *covers >= copied));
        assert!(durable, "{copied} of {entered}");
    });
}

#[test]
fn copying_clusters_costs_no_flush() {
    on_main(|graph| async move {
        let (_, base) = image(&graph, "base", BackingRef::None).await;
        write(&base, 0, SIZE, 1).await;
        let (recorder, top) = image(&graph, "top", backing("base")).await;
        write(&top, 0, CLUSTER, 2).await;
        top.flush().await.unwrap();
        let before = recorder.position();
        for i in 1..60 {
            // In the middle of a cluster, which is copied as a whole, and at its start.
            write(&top, i * CLUSTER + (i % 2) * 1024, 512, 3).await;
        }
        let flushes = recorder.events()[before..]
            .iter()
            .filter(|event| matches!(event, Event::Flush { .. }))
            .count();
        assert_eq!(flushes, 0);
        top.flush().await.unwrap();
        let report = Image::new(&recorder.content()).check();
        assert!(report.errors.is_empty() && report.leaks == 0, "{report:?}");
    });
}

#[test]
fn what_is_copied_to_a_data_file_is_durable_before_a_table_refers_to_it() {
    on_main(|graph| async move {
        let (_, base) = image(&graph, "base", BackingRef::None).await;
        write(&base, 0, SIZE, 1).await;
        let mut content = LAYOUT.image();
        // The data is elsewhere.
        content[79] = 4;
        let recorder = Recorder::new(content, 1);
        graph
            .add_node(Some("f"), recorder.driver(), options())
            .unwrap();
        let data = TestStorage::new(SIZE);
        graph.add_node(Some("d"), data.driver(), options()).unwrap();
        let top = graph
            .blockdev_add(BlockdevOptions {
                node_name: Some("top".to_owned()),
                ..BlockdevOptions::new(DriverOptions::Qcow2(Qcow2Options {
                    backing: backing("base"),
                    data_file: Some(BlockdevRef::Name("d".to_owned())),
                    ..Qcow2Options::new(BlockdevRef::Name("f".to_owned()))
                }))
            })
            .await
            .unwrap();
        write(&top, CLUSTER + 512, 512, 2).await;
        let second = first_l2(&recorder.content()) as usize + 8;

        data.hold(Match::op(IoOp::Flush));
        let flushing = Arc::clone(&top);
        let flush = spawn_local(async move { flushing.flush().await });
        data.wait_held(1).await;
        assert_eq!(entry(&recorder.content(), second), 0);
        data.release_all();
        flush.await.unwrap();
        assert_ne!(entry(&recorder.content(), second), 0);
        let cluster = sectors(&top, CLUSTER, CLUSTER).await;
        assert_eq!(cluster, [1, 2, 1, 1, 1, 1, 1, 1]);
    });
}
