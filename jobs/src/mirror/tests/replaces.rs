//! Mirrors that replace a node below the source.

use block::{BlockdevOptions, BlockdevRef, DriverOptions, ThrottleOptions};

use super::*;

/// A throttle filter over `src`, with a device on it.
async fn filtered(rig: &Rc<Rig>) -> Arc<Backend> {
    let group = block::ThrottleLimits::default();
    rig.graph
        .throttle_groups()
        .create("group", group)
        .expect("a group");
    let below = rig.graph.add_node(
        Some("below"),
        rig.source.driver(),
        NodeOptions {
            discard: DiscardMode::Unmap,
            ..NodeOptions::default()
        },
    );
    below.expect("a node");
    let options = BlockdevOptions {
        node_name: Some("filter".to_owned()),
        discard: Some(DiscardMode::Unmap),
        ..BlockdevOptions::new(DriverOptions::Throttle(ThrottleOptions {
            group: "group".to_owned(),
            file: BlockdevRef::Name("below".to_owned()),
        }))
    };
    let filter = rig.graph.blockdev_add(options).await.expect("a filter");
    let disk = rig.graph.attach("disk1", &filter, device(), None);
    disk.expect("device")
}

#[test]
fn replaces_swaps_the_node_below_a_filter_and_keeps_the_filter() {
    with_rig(|rig| async move {
        let disk = filtered(&rig).await;
        scribble(&rig.source);
        let spec = MirrorSpec {
            source: rig.node("filter"),
            replaces: Some("below".to_owned()),
            ..rig.spec()
        };
        let key = rig.ready(spec).await;
        let refused = rig.graph.blockdev_del("below").await.unwrap_err();
        assert_eq!(refused.to_string(), "Block device below is in use");
        disk.write(CHUNK, filled(4096, 5), WriteFlags::default())
            .await
            .expect("a write");
        rig.pivot(key).await;
        assert_eq!(disk.root().name(), "filter");
        let below = rig.node("filter").driver().filtered();
        assert_eq!(below.expect("a child").name(), "dst");
        rig.assert_equal();
        rig.graph.blockdev_del("below").await.expect("it is free");
        disk.write(0, filled(512, 8), WriteFlags::default())
            .await
            .expect("a write");
        assert_eq!(rig.target.peek(0, 1), [8]);
        assert_ne!(rig.source.peek(0, 1), [8]);
    });
}

#[test]
fn replaces_takes_only_nodes_that_show_what_the_source_shows() {
    with_rig(|rig| async move {
        let _disk = filtered(&rig).await;
        let refused = async |replaces: &str| {
            let spec = MirrorSpec {
                source: rig.node("filter"),
                replaces: Some(replaces.to_owned()),
                ..rig.spec()
            };
            rig.try_start(spec).await.unwrap_err().to_string()
        };
        assert_eq!(
            refused("nosuch").await,
            "Failed to find node with node-name='nosuch'"
        );
        assert_eq!(
            refused("src").await,
            "Cannot replace 'src' by a node mirrored from 'filter', because it cannot be \
             guaranteed that doing so would not lead to an abrupt change of visible data"
        );
        assert!(rig.jobs.query().is_empty());
    });
}

#[test]
fn a_node_that_does_not_show_the_source_any_more_is_not_replaced() {
    with_rig(|rig| async move {
        let disk = filtered(&rig).await;
        let spec = MirrorSpec {
            source: rig.node("filter"),
            replaces: Some("below".to_owned()),
            ..rig.spec()
        };
        let key = rig.ready(spec).await;
        // Somebody puts another node under the filter.
        let storage = TestStorage::new(SIZE);
        let other = rig
            .graph
            .add_node(Some("other"), storage.driver(), NodeOptions::default())
            .expect("a node");
        let below = rig.node("below");
        let drained = rig.graph.drain(&below, &[]).await.expect("a section");
        let replaced = rig.graph.replace(&below, &other, &[], &drained);
        replaced.expect("it is replaced");
        drop(drained);
        rig.act(|jobs| jobs.complete(key));
        rig.wait_for(JobStatus::Null).await;
        let error = rig.completed().flatten().expect("it fails");
        assert!(error.contains("no longer shows it"), "{error}");
        assert_eq!(disk.root().name(), "filter");
    });
}
