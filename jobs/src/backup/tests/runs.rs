//! Short runs, which are copied together from file to file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use block::{BlockdevOptions, DriverOptions, FileOptions, NewBitmap};
use tempfile::NamedTempFile;

use crate::backup::{BackupSpec, BackupSync};

use super::*;

/// What the target holds where nothing is copied.
const BEFORE: u8 = 0xee;

/// An image of [`SIZE`] bytes and its node.
async fn image(rig: &Rig, place: &Path, name: &str) -> (NamedTempFile, Arc<Node>) {
    let file = NamedTempFile::new_in(place).expect("a file");
    file.as_file().set_len(SIZE).expect("room");
    let mut options = BlockdevOptions::new(DriverOptions::File(FileOptions {
        filename: file.path().to_owned(),
        locking: None,
        host_device: false,
        bitmap_file: None,
    }));
    options.node_name = Some(name.to_owned());
    let node = rig.graph.blockdev_add(options).await.expect("a node");
    (file, node)
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    file.read_exact_at(&mut bytes, 0).expect("content");
    bytes
}

fn byte_of(cluster: u64) -> u8 {
    cluster as u8 | 1
}

/// Backs up every other cluster of an image of which the last quarter, and one cluster more,
/// are holes.
async fn back_up_every_other_cluster(rig: &Rig, place: &Path) {
    let (source, node) = image(rig, place, "from").await;
    let (target, other) = image(rig, place, "to").await;
    let clusters = SIZE / CLUSTER;
    let is_hole = |cluster: u64| cluster == 8 || cluster >= clusters / 4 * 3;
    for cluster in (0..clusters).filter(|cluster| !is_hole(*cluster)) {
        let bytes = [byte_of(cluster); CLUSTER as usize];
        let written = source.as_file().write_all_at(&bytes, cluster * CLUSTER);
        written.expect("room");
    }
    let before = vec![BEFORE; SIZE as usize];
    target.as_file().write_all_at(&before, 0).expect("room");
    let bitmap = NewBitmap {
        name: "b0",
        granularity: Some(CLUSTER as u32),
        enabled: true,
        persistent: false,
    };
    let bitmap = node.add_bitmap(&bitmap).expect("a bitmap");
    for cluster in (0..clusters).step_by(2) {
        bitmap.bits().set(cluster * CLUSTER, CLUSTER);
    }
    let spec = BackupSpec {
        sync: BackupSync::Incremental,
        bitmap: Some("b0".to_owned()),
        ..BackupSpec::new("j0", node, other)
    };
    rig.start(spec).await;
    assert_eq!(rig.end().await, None);
    let bytes = content(target.as_file());
    for cluster in 0..clusters {
        let expected = match cluster % 2 {
            0 if is_hole(cluster) => 0,
            0 => byte_of(cluster),
            _ => BEFORE,
        };
        let start = (cluster * CLUSTER) as usize;
        let differs = bytes[start..][..CLUSTER as usize]
            .iter()
            .position(|byte| *byte != expected);
        assert_eq!(differs, None, "cluster {cluster}");
    }
}

#[test]
fn every_other_cluster_arrives_and_nothing_between_them() {
    let on_disk = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    for place in [Path::new("/dev/shm"), &on_disk] {
        with_rig(|rig| async move {
            back_up_every_other_cluster(&rig, place).await;
        });
    }
}
