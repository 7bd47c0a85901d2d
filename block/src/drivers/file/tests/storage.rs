//! Holes, zeroes and their fallbacks, full and failing storage, block devices.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use super::*;
use crate::error::IoErrorKind;
use crate::runtime::EventLoop;

const MIB: u64 = 1 << 20;

fn full(place: &Path, size: u64) -> NamedTempFile {
    let image = image_in(place, 0);
    std::fs::write(image.path(), vec![0x55; size as usize]).unwrap();
    image.as_file().sync_all().unwrap();
    image
}

fn allocated(image: &NamedTempFile) -> u64 {
    image.as_file().metadata().unwrap().blocks() * 512
}

fn zero_flags(may_unmap: bool) -> ZeroFlags {
    ZeroFlags {
        may_unmap,
        ..ZeroFlags::default()
    }
}

#[test]
fn zeroes_that_may_unmap_free_space_and_others_keep_it() {
    for place in places() {
        let image = full(&place, 4 * MIB);
        let driver = open_image(image.path(), false);
        let event_loop = EventLoop::new("test").unwrap();
        event_loop.block_on(async {
            let before = allocated(&image);
            driver
                .write_zeroes(MIB, MIB, zero_flags(false))
                .await
                .unwrap();
            assert!(allocated(&image) + 65536 >= before, "{place:?}");
            driver
                .write_zeroes(MIB, MIB, zero_flags(true))
                .await
                .unwrap();
            assert!(allocated(&image) <= before - MIB + 65536, "{place:?}");
            driver.discard(2 * MIB, MIB).await.unwrap();
            assert!(allocated(&image) <= before - 2 * MIB + 65536, "{place:?}");
        });
        let content = std::fs::read(image.path()).unwrap();
        let (kept, zero) = (vec![0x55; MIB as usize], vec![0; MIB as usize]);
        assert!(content == [&kept[..], &zero, &zero, &kept].concat());
    }
}

#[test]
fn zeroes_become_data_if_the_storage_can_do_nothing_better() {
    for (no_fallback, direct) in [(false, false), (true, false), (false, true)] {
        let image = full(&disk(), 4 * MIB);
        let mut driver = open_image(image.path(), direct);
        if direct {
            driver = with_blocks(driver, 4096, 4096);
        }
        driver.support = Support::none();
        let event_loop = EventLoop::new("test").unwrap();
        let flags = ZeroFlags {
            no_fallback,
            may_unmap: true,
            fua: true,
        };
        let result = event_loop.block_on(driver.write_zeroes(512, 3 * MIB, flags));
        let content = std::fs::read(image.path()).unwrap();
        if no_fallback {
            let error = result.unwrap_err();
            assert_eq!(error.errno, libc::EOPNOTSUPP);
            assert_eq!(error.kind(), IoErrorKind::NotSupported);
            assert!(content.iter().all(|b| *b == 0x55));
        } else {
            result.unwrap();
            let zeroes = 512..(512 + 3 * MIB) as usize;
            for (i, byte) in content.iter().enumerate() {
                assert_eq!(*byte == 0, zeroes.contains(&i), "byte {i}");
            }
        }
        // A hint may always be ignored.
        event_loop.block_on(driver.discard(0, MIB)).unwrap();
    }
}

#[test]
fn a_refused_mode_is_remembered() {
    let image = full(Path::new("/dev/shm"), MIB);
    let driver = open_image(image.path(), false);
    let event_loop = EventLoop::new("test").unwrap();
    for _ in 0..2 {
        event_loop
            .block_on(driver.write_zeroes(0, MIB / 2, zero_flags(false)))
            .unwrap();
    }
    // tmpfs has no FALLOC_FL_ZERO_RANGE (as of Linux 6.18).
    assert!(!driver.support.has_zero_range());
    let content = std::fs::read(image.path()).unwrap();
    assert!(content[..content.len() / 2].iter().all(|b| *b == 0));
    assert!(content[content.len() / 2..].iter().all(|b| *b == 0x55));
}

#[test]
fn status_is_that_of_the_moment_whatever_was_found_before() {
    const CHUNK: u64 = 64 << 10;
    const CHUNKS: u64 = 300;
    for place in places() {
        let image = image_in(&place, CHUNKS * CHUNK);
        let mut data: Vec<bool> = (0..CHUNKS).map(|chunk| chunk % 2 == 1).collect();
        for chunk in (1..CHUNKS).step_by(2) {
            let bytes = vec![1; CHUNK as usize];
            image.as_file().write_all_at(&bytes, chunk * CHUNK).unwrap();
        }
        let driver = open_image(image.path(), false);
        EventLoop::new("test").unwrap().block_on(async {
            for round in 0..4 {
                let mut at = 0;
                while at < CHUNKS * CHUNK {
                    let left = CHUNKS * CHUNK - at;
                    let extent = driver.block_status(at, left).await.unwrap();
                    assert!(extent.len > 0 && extent.len <= left);
                    for chunk in at.div_ceil(CHUNK)..(at + extent.len).div_ceil(CHUNK) {
                        // Data that has become a hole may be told as data.
                        if data[chunk as usize] {
                            assert!(extent.flags.data, "round {round}: chunk {chunk} has data");
                        }
                    }
                    at += extent.len;
                    if let Some(next) = data.get((at / CHUNK) as usize)
                        && round == 0
                    {
                        assert!(at.is_multiple_of(CHUNK) && *next != extent.flags.data);
                    }
                }
                // Into holes between runs that are known: by this node, and by others.
                let (own, other) = (40 + 2 * round, 240 + 2 * round);
                let iov = AlignedBuffer::new(512).io_vec(512);
                iov.fill(2);
                let flags = WriteFlags::default();
                driver.write(own * CHUNK, iov, flags).await.unwrap();
                image.as_file().write_all_at(&[2], other * CHUNK).unwrap();
                for chunk in [own, other] {
                    data[chunk as usize] = true;
                    let extent = driver.block_status(chunk * CHUNK, CHUNK).await.unwrap();
                    assert!(extent.flags.data, "round {round}: chunk {chunk}");
                }
                let zero = ZeroFlags {
                    may_unmap: true,
                    ..ZeroFlags::default()
                };
                let gone = 101 + 2 * round;
                driver
                    .write_zeroes(gone * CHUNK, CHUNK, zero)
                    .await
                    .unwrap();
                data[gone as usize] = false;
                let extent = driver.block_status(gone * CHUNK, CHUNK).await.unwrap();
                assert!(extent.flags.zero, "round {round}");
            }
        });
    }
}

#[test]
fn status_shows_data_and_holes() {
    for place in places() {
        let image = image_in(&place, 8 * MIB);
        let driver = open_image(image.path(), false);
        let event_loop = EventLoop::new("test").unwrap();
        event_loop.block_on(async {
            let iov = AlignedBuffer::new(MIB as usize).io_vec(MIB as usize);
            iov.fill(1);
            driver
                .write(2 * MIB, iov, WriteFlags::default())
                .await
                .unwrap();
            let status = |offset| driver.block_status(offset, 8 * MIB - offset);
            let hole = status(0).await.unwrap();
            assert_eq!((hole.len, hole.flags.zero), (2 * MIB, true));
            assert!(!hole.flags.data);
            let data = status(2 * MIB + 512).await.unwrap();
            assert_eq!((data.len, data.flags.data), (MIB - 512, true));
            let rest = status(3 * MIB).await.unwrap();
            assert_eq!((rest.len, rest.flags.zero), (5 * MIB, true));
            let part = driver.block_status(MIB, 4096).await.unwrap();
            assert_eq!(part.len, 4096);
            // What is remembered as data is not after it became a hole.
            driver.discard(2 * MIB, MIB / 2).await.unwrap();
            let hole = status(2 * MIB).await.unwrap();
            assert_eq!((hole.len, hole.flags.zero), (MIB / 2, true));
        });
    }
}

#[test]
fn a_full_file_system_says_no_space_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mount) = Mount::tmpfs(dir.path(), "size=1m") else {
        eprintln!("skipped: mounting a tmpfs needs root");
        return;
    };
    let image = dir.path().join("image");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(4 * MIB)
        .unwrap();
    let driver = open_image(&image, false);
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let iov = AlignedBuffer::new(2 * MIB as usize).io_vec(2 * MIB as usize);
        iov.fill(1);
        let error = driver
            .write(0, iov.clone(), WriteFlags::default())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), IoErrorKind::NoSpace);
        assert_eq!((error.offset, error.len), (0, 2 * MIB));
        assert_eq!(
            error.to_string(),
            "write at offset 0, 2097152 bytes, of node 'node' failed: \
             No space left on device (os error 28)"
        );
        let error = driver
            .write_zeroes(0, 4 * MIB, zero_flags(false))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), IoErrorKind::NoSpace);
        driver
            .write_zeroes(0, 4 * MIB, zero_flags(true))
            .await
            .unwrap();
        driver
            .write(0, iov.slice(0, 4096), WriteFlags::default())
            .await
            .unwrap();
        driver.flush().await.unwrap();
    });
    drop(driver);
    drop(mount);
}

#[test]
fn a_failed_flush_fails_for_ever() {
    let image = image_in(&disk(), 4096);
    let mut driver = open_image(image.path(), false);
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(driver.flush()).unwrap();
    // A pipe stands for a disk that loses a page: it cannot be synced. The file
    // comes back as if the kernel had forgotten the error.
    let (pipe, _writer) = std::io::pipe().unwrap();
    let good = std::mem::replace(
        &mut driver.file,
        Arc::new(File::from(std::os::fd::OwnedFd::from(pipe))),
    );
    // Dropped before its result is there: it counts all the same.
    event_loop.block_on(async {
        use futures_util::FutureExt;
        assert!(driver.flush().now_or_never().is_none());
        while current_ring().in_flight() > 0 {
            crate::runtime::sleep(std::time::Duration::from_millis(1)).await;
        }
    });
    driver.file = good;
    for _ in 0..2 {
        let error = event_loop.block_on(driver.flush()).unwrap_err();
        assert_eq!((error.op, error.errno), (IoOp::Flush, libc::EINVAL));
    }
    let iov = AlignedBuffer::new(512).io_vec(512);
    let fua = WriteFlags {
        fua: true,
        ..WriteFlags::default()
    };
    assert!(event_loop.block_on(driver.write(0, iov, fua)).is_err());
}

#[test]
fn a_durable_write_syncs_as_a_flush_does_whose_errors_are_remembered() {
    for direct in [false, true] {
        let image = image_in(&disk(), 4096);
        let driver = open_image(image.path(), direct);
        let event_loop = EventLoop::new("test").unwrap();
        let write = || {
            let fua = WriteFlags {
                fua: true,
                ..WriteFlags::default()
            };
            event_loop.block_on(driver.write(0, AlignedBuffer::new(4096).io_vec(4096), fua))
        };
        write().unwrap();
        assert_eq!(driver.flushes.done.load(Ordering::SeqCst), 1, "{direct}");
        driver.flushes.failed.store(libc::EIO, Ordering::SeqCst);
        assert_eq!(write().unwrap_err().errno, libc::EIO, "{direct}");
    }
}

#[test]
fn no_flush_makes_flush_and_fua_free_of_charge() {
    let image = image_in(&disk(), 4096);
    let mut driver = open_image(image.path(), false);
    driver.no_flush = true;
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        driver.flush().await.unwrap();
        let iov = AlignedBuffer::new(512).io_vec(512);
        let fua = WriteFlags {
            fua: true,
            ..WriteFlags::default()
        };
        driver.write(0, iov, fua).await.unwrap();
    });
    assert_eq!(driver.flushes.begun.load(Ordering::SeqCst), 0);
}

#[test]
fn flushes_that_wait_share_the_next_one() {
    let image = image_in(&disk(), 4096);
    let driver = open_image(image.path(), false);
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let all = futures_util::future::join_all((0..50).map(|_| driver.flush())).await;
        all.into_iter().for_each(Result::unwrap);
    });
    let begun = driver.flushes.begun.load(Ordering::SeqCst);
    assert!((1..=2).contains(&begun), "{begun}");
}

#[test]
fn requests_on_a_block_device_of_4096_byte_sectors() {
    let image = full(&disk(), 8 * MIB);
    let Some(device) = Loop::attach(image.path(), 4096) else {
        eprintln!("skipped: loop devices need root");
        return;
    };
    for direct in [false, true] {
        let options = FileOptions {
            host_device: true,
            bitmap_file: None,
            ..file_options(&device.path)
        };
        let driver = open("node", &options, flags(direct)).unwrap();
        assert_eq!(driver.name(), "host_device");
        assert_eq!(driver.size(), 8 * MIB);
        assert_eq!(driver.limits().zero_alignment, 4096);
        if direct {
            assert_eq!(driver.limits().request_alignment, 4096);
        }
        let event_loop = EventLoop::new("test").unwrap();
        event_loop.block_on(async {
            let iov = AlignedBuffer::new(8192).io_vec(8192);
            let check = async |offset: u64, byte: u8, len: usize| {
                iov.fill(0xee);
                driver.read(offset, iov.slice(0, len)).await.unwrap();
                let mut data = vec![0; len];
                iov.copy_to(0, &mut data);
                assert!(
                    data.iter().all(|b| *b == byte),
                    "at {offset}, direct {direct}"
                );
            };
            iov.fill(0x55);
            driver
                .write(0, iov.clone(), WriteFlags::default())
                .await
                .unwrap();
            // Half sectors at both ends, for which the device has no command.
            for may_unmap in [false, true] {
                driver
                    .write_zeroes(2048 + 512, 3 * MIB, zero_flags(may_unmap))
                    .await
                    .unwrap();
                check(0, 0x55, 2560).await;
                check(2560, 0, 8192).await;
                check(3 * MIB, 0, 2560).await;
                check(3 * MIB + 2560, 0x55, 512).await;
            }
            iov.fill(9);
            driver
                .write(1536, iov.slice(0, 5120), WriteFlags::default())
                .await
                .unwrap();
            check(1024, 0x55, 512).await;
            check(1536, 9, 5120).await;
            check(6656, 0, 512).await;
            driver.discard(4 * MIB + 512, MIB).await.unwrap();
            check(4 * MIB, 0x55, 512).await;
            driver.flush().await.unwrap();
            // As it was, for the next round.
            for offset in (0..8 * MIB).step_by(8192) {
                iov.fill(0x55);
                driver
                    .write(offset, iov.clone(), WriteFlags::default())
                    .await
                    .unwrap();
            }
        });
    }
}

/// A mount that ends with the test.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(at: &Path, options: &str) -> Option<Self> {
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "none"])
            .arg(at)
            .output();
        status
            .is_ok_and(|output| output.status.success())
            .then(|| Self(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A loop device that ends with the test.
struct Loop {
    path: PathBuf,
}

impl Loop {
    fn attach(image: &Path, sector: u32) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(image)
            .output()
            .ok()?;
        let path = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Self {
            path: PathBuf::from(path.trim()),
        })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.path)
            .status();
    }
}

#[test]
fn the_end_of_long_data_in_memory_is_found_wherever_it_is() {
    // About where it is seen whether there is a hole.
    let ends = [1, 3, 7, 15, 31].map(|end| end * MIB);
    for end in ends
        .into_iter()
        .flat_map(|end| [end - 4096, end, end + 4096])
    {
        for gap in [0, 4096, 17 * MIB] {
            let image = image_in(Path::new("/dev/shm"), 0);
            let file = image.as_file();
            for at in (0..end).step_by(4096) {
                file.write_all_at(&[1; 4096], at).unwrap();
            }
            if gap > 0 {
                file.write_all_at(&[1; 4096], end + gap).unwrap();
            }
            EventLoop::new("test").unwrap().block_on(async {
                for start in [0, 512, end - 512] {
                    // Nothing is remembered from the last look.
                    let driver = open_image(image.path(), false);
                    let size = driver.size();
                    let extent = driver.block_status(start, size - start).await.unwrap();
                    assert_eq!((extent.len, extent.flags.data), (end - start, true));
                }
            });
        }
    }
}

#[test]
fn data_in_memory_that_is_longer_than_one_search_is_found_in_parts() {
    const SEARCH: u64 = 256 * MIB;
    let image = image_in(Path::new("/dev/shm"), 0);
    let file = image.as_file();
    let data = vec![1; MIB as usize];
    for at in (0..SEARCH + 2 * MIB).step_by(MIB as usize) {
        file.write_all_at(&data, at).unwrap();
    }
    file.set_len(SEARCH + 4 * MIB).unwrap();
    EventLoop::new("test").unwrap().block_on(async {
        let driver = open_image(image.path(), false);
        let size = driver.size();
        let mut extents = Vec::new();
        let mut at = 0;
        while at < size {
            let extent = driver.block_status(at, size - at).await.unwrap();
            extents.push((extent.len, extent.flags.data));
            at += extent.len;
        }
        assert_eq!(extents, [(SEARCH, true), (2 * MIB, true), (2 * MIB, false)]);
    });
}

#[test]
fn all_who_ask_for_runs_of_data_at_once_share_a_look() {
    const RUN: u64 = 64 << 10;
    let image = image_in(&std::env::temp_dir(), 0);
    let file = image.as_file();
    for at in (0..50).map(|number| 2 * number * RUN) {
        file.write_all_at(&[1; RUN as usize], at).unwrap();
    }
    file.set_len(100 * RUN).unwrap();
    EventLoop::new("test").unwrap().block_on(async {
        let mut looks = Vec::new();
        // On a busy machine their patience may be at an end before it is there.
        while looks.last() != Some(&1) {
            assert!(looks.len() < 50, "{looks:?}");
            let driver = open_image(image.path(), false);
            let runs = (0..50).map(|number| 2 * number * RUN);
            let status = |at| driver.block_status(at, driver.size() - at);
            for extent in futures_util::future::join_all(runs.map(status)).await {
                let extent = extent.unwrap();
                assert_eq!((extent.len, extent.flags.data), (RUN, true));
            }
            looks.push(driver.data_runs.looks());
        }
    });
}
