//! Persistent bitmaps of nodes in a graph: when they may be added, reopened, and moved.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use futures_util::future::{FutureExt as _, join};

use super::*;
use crate::bitmaps::{BitmapChange, NamedBitmapError, NewBitmap};
use crate::options::{BlockdevOptions, BlockdevRef, DriverOptions, FileOptions, RawOptions};
use crate::runtime;

const MIB: u64 = 1 << 20;

/// Images in a directory that goes.
struct Images(tempfile::TempDir);

impl Images {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn side_car(&self, name: &str) -> PathBuf {
        self.0.path().join(format!("{name}.bitmaps"))
    }

    /// A raw node that may have persistent bitmaps.
    async fn open(&self, graph: &Graph, name: &str) -> Arc<Node> {
        let image = self.0.path().join(name);
        if !image.exists() {
            let file = std::fs::File::create(&image).unwrap();
            file.set_len(64 * MIB).unwrap();
        }
        let file = DriverOptions::File(FileOptions {
            filename: image,
            locking: None,
            host_device: false,
            bitmap_file: Some(self.side_car(name)),
        });
        let raw = DriverOptions::Raw(RawOptions {
            file: BlockdevRef::Inline(Box::new(BlockdevOptions::new(file))),
            offset: 0,
            size: None,
        });
        let options = BlockdevOptions {
            node_name: Some(name.to_owned()),
            ..BlockdevOptions::new(raw)
        };
        graph.blockdev_add(options).await.unwrap()
    }
}

fn persistent(name: &str) -> NewBitmap<'_> {
    NewBitmap {
        name,
        granularity: None,
        persistent: true,
        enabled: true,
    }
}

async fn add(graph: &Graph, node: &Arc<Node>, name: &str) {
    let room = graph.prepare_bitmap(node, &persistent(name)).await.unwrap();
    let change = BitmapChange::add(node, &persistent(name)).unwrap();
    change.commit();
    drop(room);
    graph.store_bitmaps(&[Arc::clone(node)]).await.unwrap();
}

fn names(node: &Node) -> Vec<String> {
    let all = node.named_bitmaps();
    all.iter().map(|bitmap| bitmap.name().to_owned()).collect()
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if condition() {
            return;
        }
        runtime::sleep(Duration::from_millis(1)).await;
    }
    panic!("never: {what}");
}

#[test]
fn each_who_adds_a_bitmap_waits_for_writes_that_are_not_marked() {
    on_main(async |graph| {
        let images = Images::new();
        let disk = images.open(&graph, "disk").await;
        let user = attach(&graph, "user", &disk);
        // It was let in before anybody thought of marks.
        let under_way = user.enter().await;
        let (one, two) = (persistent("one"), persistent("two"));
        let mut first = pin!(graph.prepare_bitmap(&disk, &one).fuse());
        let mut second = pin!(graph.prepare_bitmap(&disk, &two).fuse());
        until("both wait for it", || {
            assert!((&mut first).now_or_never().is_none());
            user.is_drained()
        })
        .await;
        for _ in 0..20 {
            assert!((&mut second).now_or_never().is_none());
            assert!((&mut first).now_or_never().is_none());
            runtime::sleep(Duration::from_millis(1)).await;
        }
        under_way
            .write(0, bytes(512, 1), WriteFlags::default())
            .await
            .unwrap();
        drop(under_way);
        let (first, second) = join(first, second).await;
        let rooms = (first.unwrap(), second.unwrap());
        // Nobody waits again.
        let _under_way = user.enter().await;
        let three = persistent("three");
        let third = graph.prepare_bitmap(&disk, &three).await.unwrap();
        drop((rooms, third));
        graph.store_bitmaps(&[Arc::clone(&disk)]).await.unwrap();
        assert!(!images.side_car("disk").exists());
    });
}

#[test]
fn what_was_made_for_a_bitmap_goes_if_nobody_waits_for_it() {
    on_main(async |graph| {
        let images = Images::new();
        let disk = images.open(&graph, "disk").await;
        for _ in 0..5 {
            let one = persistent("one");
            let mut prepared = Box::pin(graph.prepare_bitmap(&disk, &one).fuse());
            let mut room = None;
            until("a keeper is there", || {
                room = room.take().or_else(|| (&mut prepared).now_or_never());
                disk.keeps_bitmaps()
            })
            .await;
            drop((prepared, room));
            // Whatever it was doing goes on, and is taken back.
            let gone = || !disk.keeps_bitmaps() && !images.side_car("disk").exists();
            until("it has gone", gone).await;
        }
        // Nor does one that nobody waited for at all take this one away.
        let nobody = graph
            .prepare_bitmap(&disk, &persistent("nobody's"))
            .now_or_never();
        assert!(nobody.is_none());
        add(&graph, &disk, "one").await;
        for _ in 0..20 {
            assert!(images.side_car("disk").exists());
            runtime::sleep(Duration::from_millis(1)).await;
        }
    });
}

#[test]
fn a_node_is_made_read_only_and_writable_again_at_once() {
    on_main(async |graph| {
        let images = Images::new();
        let disk = images.open(&graph, "disk").await;
        add(&graph, &disk, "b").await;
        let user = graph
            .attach(
                "",
                &disk,
                Permissions {
                    need: Perm::NONE,
                    share: Perm::ALL,
                },
                None,
            )
            .unwrap();
        for round in 0..10 {
            graph.set_permissions(&user, writer()).unwrap();
            let at = round * MIB;
            user.write(at, bytes(512, 1), WriteFlags::default())
                .await
                .unwrap();
            let idle = Permissions {
                need: Perm::NONE,
                share: Perm::ALL,
            };
            graph.set_permissions(&user, idle).unwrap();
            graph.set_read_only(&disk, true).await.unwrap();
            assert!(!disk.keeps_bitmaps());
            graph.set_read_only(&disk, false).await.unwrap();
            let bitmap = disk.named_bitmap("b").unwrap();
            assert!(bitmap.is_recording() && bitmap.bits().is_dirty(at));
        }
    });
}

fn same_content(one: &Path, other: &Path) -> bool {
    std::fs::read(one).unwrap() == std::fs::read(other).unwrap()
}

#[test]
fn a_file_that_took_the_place_of_another_one_is_loaded_again() {
    on_main(async |graph| {
        let images = Images::new();
        let disk = images.open(&graph, "disk").await;
        add(&graph, &disk, "b").await;
        let bitmap = disk.named_bitmap("b").unwrap();
        graph.set_read_only(&disk, true).await.unwrap();
        assert!(!bitmap.bits().is_dirty(0));
        // Another program writes the disk meanwhile, and has made the bitmap anew.
        let side_car = images.side_car("disk");
        let before = images.0.path().join("before");
        std::fs::rename(&side_car, &before).unwrap();
        {
            let other = Graph::new();
            let disk = images.open(&other, "disk").await;
            add(&other, &disk, "b").await;
            let user = attach(&other, "user", &disk);
            user.write(0, bytes(512, 1), WriteFlags::default())
                .await
                .unwrap();
            other.detach(&user);
            drop(user);
            drop(disk);
            other.blockdev_del("disk").await.unwrap();
        }
        assert!(!same_content(&side_car, &before));
        graph.set_read_only(&disk, false).await.unwrap();
        assert_eq!(names(&disk), ["b"]);
        assert!(disk.named_bitmap("b").unwrap().bits().is_dirty(0));
    });
}

#[test]
fn room_does_not_go_with_an_older_one() {
    on_main(async |graph| {
        let images = Images::new();
        let from = images.open(&graph, "from").await;
        let to = images.open(&graph, "to").await;
        add(&graph, &from, "b").await;
        let side_car = images.side_car("to");
        let older = graph.make_room_for_bitmaps(&from, &to).await.unwrap();
        let newer = graph.make_room_for_bitmaps(&from, &to).await.unwrap();
        drop(older);
        // Answered in turn: what the older one had asked for would be done before this.
        graph.store_bitmaps(&[Arc::clone(&to)]).await.unwrap();
        assert!(side_car.exists() && to.keeps_bitmaps());
        let copied = graph.copy_kept_bitmaps(&from, &to, Some(&newer));
        let copied = copied.now_or_never().expect("there is nothing to wait for");
        copied.commit();
        drop(newer);
        graph.store_bitmaps(&[Arc::clone(&to)]).await.unwrap();
        assert!(side_car.exists() && to.named_bitmap("b").unwrap().is_recording());
    });
}

fn remove(node: &Node, name: &str) {
    let bitmap = node.named_bitmap(name).unwrap();
    BitmapChange::remove(&bitmap).unwrap().commit();
}

#[test]
fn a_file_stays_between_prepared_and_added_whoever_removes_the_last_bitmap() {
    on_main(async |graph| {
        let images = Images::new();
        let disk = images.open(&graph, "disk").await;
        let nodes = [Arc::clone(&disk)];
        add(&graph, &disk, "one").await;
        let room = graph.prepare_bitmap(&disk, &persistent("two")).await;
        // Somebody else's room goes, and with it what may be the last bitmap.
        let others = graph.prepare_bitmap(&disk, &persistent("other")).await;
        remove(&disk, "one");
        graph.store_bitmaps(&nodes).await.unwrap();
        drop(others.unwrap());
        graph.store_bitmaps(&nodes).await.unwrap();
        assert!(images.side_car("disk").exists());
        let user = attach(&graph, "user", &disk);
        BitmapChange::add(&disk, &persistent("two"))
            .unwrap()
            .commit();
        drop(room.unwrap());
        user.write(MIB, bytes(512, 1), WriteFlags::default())
            .await
            .unwrap();
        graph.store_bitmaps(&nodes).await.unwrap();
        let bitmap = disk.named_bitmap("two").unwrap();
        assert!(bitmap.is_recording() && bitmap.bits().is_dirty(MIB));
        // The last one goes with the file, as ever.
        remove(&disk, "two");
        graph.store_bitmaps(&nodes).await.unwrap();
        assert!(!images.side_car("disk").exists());
    });
}

#[test]
fn nothing_is_added_without_room() {
    on_main(async |graph| {
        let images = Images::new();
        let disk = images.open(&graph, "disk").await;
        add(&graph, &disk, "one").await;
        assert!(disk.keeps_bitmaps());
        let error = BitmapChange::add(&disk, &persistent("two")).unwrap_err();
        assert!(matches!(error, NamedBitmapError::NotKept(_)), "{error}");
        // The file is closed: whoever had room has none any more.
        let room = graph.prepare_bitmap(&disk, &persistent("two")).await;
        graph.set_read_only(&disk, true).await.unwrap();
        let error = BitmapChange::add(&disk, &persistent("two")).unwrap_err();
        assert!(matches!(error, NamedBitmapError::NotKept(_)), "{error}");
        drop(room.unwrap());
        assert_eq!(names(&disk), ["one"]);
    });
}

#[test]
fn who_makes_a_file_at_the_same_time_gets_room_in_the_same_one() {
    on_main(async |graph| {
        let images = Images::new();
        let disk = images.open(&graph, "disk").await;
        let (one, two) = (persistent("one"), persistent("two"));
        let rooms = join(
            graph.prepare_bitmap(&disk, &one),
            graph.prepare_bitmap(&disk, &two),
        )
        .await;
        let rooms = (rooms.0.unwrap(), rooms.1.unwrap());
        for new in [&one, &two] {
            BitmapChange::add(&disk, new).unwrap().commit();
        }
        drop(rooms);
        graph.store_bitmaps(&[Arc::clone(&disk)]).await.unwrap();
        assert!(
            disk.named_bitmaps()
                .iter()
                .all(|bitmap| bitmap.is_recording())
        );
    });
}

#[test]
fn a_guest_writes_on_when_the_file_went_while_its_disk_was_read_only() {
    on_main(async |graph| {
        let images = Images::new();
        let disk = images.open(&graph, "disk").await;
        add(&graph, &disk, "b").await;
        graph.set_read_only(&disk, true).await.unwrap();
        std::fs::remove_file(images.side_car("disk")).unwrap();
        graph.set_read_only(&disk, false).await.unwrap();
        assert!(disk.named_bitmap("b").unwrap().is_inconsistent());
        let user = attach(&graph, "user", &disk);
        user.write(0, bytes(512, 1), WriteFlags::default())
            .await
            .unwrap();
        // And all begins anew.
        remove(&disk, "b");
        add(&graph, &disk, "b").await;
        assert!(images.side_car("disk").exists());
    });
}

#[test]
fn a_file_without_bitmaps_that_a_crash_left_goes() {
    on_main(async |graph| {
        let images = Images::new();
        let left = images.0.path().join("left");
        {
            let disk = images.open(&graph, "disk").await;
            let room = graph.prepare_bitmap(&disk, &persistent("b")).await;
            std::fs::copy(images.side_car("disk"), &left).unwrap();
            drop((room.unwrap(), disk));
            graph.blockdev_del("disk").await.unwrap();
        }
        std::fs::rename(&left, images.side_car("disk")).unwrap();
        let disk = images.open(&graph, "disk").await;
        until("it goes", || !images.side_car("disk").exists()).await;
        until("nothing is kept", || !disk.keeps_bitmaps()).await;
        let user = attach(&graph, "user", &disk);
        user.write(0, bytes(512, 1), WriteFlags::default())
            .await
            .unwrap();
    });
}

#[test]
fn nothing_is_awaited_in_a_section_where_room_was_made_before() {
    on_main(async |graph| {
        let images = Images::new();
        let from = images.open(&graph, "from").await;
        let to = images.open(&graph, "to").await;
        assert!(graph.make_room_for_bitmaps(&from, &to).await.is_none());
        add(&graph, &from, "b").await;
        from.named_bitmap("b").unwrap().bits().set(3 * MIB, 512);
        let side_car = images.side_car("to");
        // Nothing comes of it.
        let room = graph.make_room_for_bitmaps(&from, &to).await.unwrap();
        assert!(side_car.exists());
        drop(room);
        until("the file goes", || !side_car.exists()).await;
        until("it is closed", || !to.keeps_bitmaps()).await;
        let room = graph.make_room_for_bitmaps(&from, &to).await.unwrap();
        let copied = graph.copy_kept_bitmaps(&from, &to, Some(&room));
        let copied = copied.now_or_never().expect("there is nothing to wait for");
        assert!(to.marks_all_writes());
        copied.commit();
        drop(room);
        graph.store_bitmaps(&[Arc::clone(&to)]).await.unwrap();
        let bitmap = to.named_bitmap("b").unwrap();
        assert!(bitmap.is_recording() && bitmap.bits().is_dirty(3 * MIB));
        assert!(side_car.exists());
    });
}
