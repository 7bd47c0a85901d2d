//! What is read is what was written, whatever the alignment: against a model.

use std::ptr::NonNull;

use futures_util::future::join_all;
use proptest::prelude::*;

use super::*;
use crate::buffer::MemoryOwner;
use crate::runtime::EventLoop;

const SIZE: u64 = 64 * 1024;
const SECTORS: u64 = SIZE / 512;

/// A list of `len` bytes in segments of `segment`, the first at `skip` in its
/// page, with gaps.
fn memory(len: usize, skip: usize, segment: usize) -> IoVec {
    let count = len.div_ceil(segment);
    let stride = segment + 64;
    let buffer = AlignedBuffer::new(skip + count * stride);
    let base = buffer.io_vec(1).to_iovecs()[0].iov_base.cast::<u8>();
    let mut left = len;
    let segments: Vec<_> = (0..count)
        .map(|i| {
            let n = segment.min(left);
            left -= n;
            // SAFETY: inside the buffer.
            let at = unsafe { base.add(skip + i * stride) };
            (NonNull::new(at).unwrap(), n)
        })
        .collect();
    // SAFETY: all segments are in the buffer, which is the owner.
    unsafe { IoVec::new(segments, buffer as Arc<dyn MemoryOwner>) }
}

#[derive(Clone, Debug)]
enum Op {
    Write { byte: u8, fua: bool },
    Zeroes { may_unmap: bool, fua: bool },
    Read,
    Flush,
    Status,
}

#[derive(Clone, Debug)]
struct Request {
    op: Op,
    offset: u64,
    len: u64,
    skip: usize,
    segment: usize,
}

fn request() -> impl Strategy<Value = Request> {
    let op = prop_oneof![
        4 => (1u8.., any::<bool>()).prop_map(|(byte, fua)| Op::Write { byte, fua }),
        2 => (any::<bool>(), any::<bool>())
            .prop_map(|(may_unmap, fua)| Op::Zeroes { may_unmap, fua }),
        3 => Just(Op::Read),
        1 => Just(Op::Flush),
        1 => Just(Op::Status),
    ];
    (
        op,
        0..SECTORS,
        1..40u64,
        prop_oneof![Just(0usize), Just(512), 1..600usize],
        prop_oneof![Just(4096usize), Just(512), 100..5000usize],
    )
        .prop_map(|(op, sector, count, skip, segment)| Request {
            op,
            offset: sector * 512,
            len: count.min(SECTORS - sector) * 512,
            skip,
            segment,
        })
}

async fn run(driver: &FileDriver, model: &mut [u8], request: &Request) {
    let Request { offset, len, .. } = *request;
    let place = offset as usize..(offset + len) as usize;
    let iov = memory(len as usize, request.skip, request.segment);
    match request.op {
        Op::Write { byte, fua } => {
            let data: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8)).collect();
            iov.copy_from(0, &data);
            let flags = WriteFlags {
                fua,
                ..WriteFlags::default()
            };
            driver.write(offset, iov, flags).await.unwrap();
            model[place].copy_from_slice(&data);
        }
        Op::Zeroes { may_unmap, fua } => {
            let flags = ZeroFlags {
                fua,
                may_unmap,
                no_fallback: false,
            };
            driver.write_zeroes(offset, len, flags).await.unwrap();
            model[place].fill(0);
        }
        Op::Read => {
            iov.fill(0xee);
            driver.read(offset, iov.clone()).await.unwrap();
            let mut data = vec![0; len as usize];
            iov.copy_to(0, &mut data);
            assert!(data == model[place], "read {offset}+{len}");
        }
        Op::Flush => driver.flush().await.unwrap(),
        Op::Status => {
            let extent = driver.block_status(offset, len).await.unwrap();
            assert!(extent.len >= 1 && extent.len <= len && extent.len.is_multiple_of(512));
            if extent.flags.zero {
                let end = offset + extent.len;
                assert!(model[offset as usize..end as usize].iter().all(|b| *b == 0));
            }
        }
    }
}

fn check(place: &Path, mode: Mode, requests: &[Request]) {
    let image = image_in(place, SIZE);
    let driver = match mode {
        Mode::Buffered => open_image(image.path(), false),
        Mode::Direct => open_image(image.path(), true),
        Mode::Blocks(memory, request) => {
            with_blocks(open_image(image.path(), true), memory, request)
        }
    };
    let mut model = vec![0; SIZE as usize];
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        for request in requests {
            run(&driver, &mut model, request).await;
        }
    });
    let content = std::fs::read(image.path()).unwrap();
    assert!(content == model);
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    Buffered,
    Direct,
    /// O_DIRECT with these alignments of memory and requests.
    Blocks(u32, u32),
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_requests_leaves_what_a_model_has(
        place in 0..2usize,
        mode in prop_oneof![
            Just(Mode::Buffered),
            Just(Mode::Direct),
            Just(Mode::Blocks(512, 4096)),
            Just(Mode::Blocks(4096, 4096)),
            Just(Mode::Blocks(4096, 512)),
        ],
        requests in prop::collection::vec(request(), 1..40),
    ) {
        check(&places()[place], mode, &requests);
    }
}

#[test]
fn neighbours_in_one_block_written_at_once_do_not_lose_each_other() {
    const ROUNDS: u8 = 30;
    for place in places() {
        let image = image_in(&place, SIZE);
        let driver = with_blocks(open_image(image.path(), true), 4096, 4096);
        let event_loop = EventLoop::new("test").unwrap();
        event_loop.block_on(async {
            for round in 1..=ROUNDS {
                // Each sector of the first blocks by a request of its own, and
                // whole blocks behind them, all in flight together.
                let sectors = (0..24u64).map(|i| (i * 512, 512, round ^ i as u8));
                let blocks = (3..6u64).map(|i| (i * 4096, 4096, round ^ i as u8));
                let zeroes = driver.write_zeroes(6 * 4096 + 512, 512, ZeroFlags::default());
                let writes = join_all(sectors.chain(blocks).map(|(offset, len, byte)| {
                    let iov = memory(len, 0, 4096);
                    iov.fill(byte);
                    driver.write(offset, iov, WriteFlags::default())
                }));
                let (writes, zeroes) = futures_util::join!(writes, zeroes);
                zeroes.unwrap();
                writes.into_iter().for_each(Result::unwrap);
                let content = std::fs::read(image.path()).unwrap();
                for i in 0..24 {
                    assert_eq!(content[i * 512], round ^ i as u8, "sector {i}");
                }
                for i in 3..6 {
                    assert_eq!(content[i * 4096 + 512], round ^ i as u8, "block {i}");
                }
            }
        });
    }
}

#[test]
fn iothreads_share_a_driver_and_its_blocks() {
    use crate::runtime::Iothread;
    let image = image_in(&disk(), SIZE);
    let driver = Arc::new(with_blocks(open_image(image.path(), true), 4096, 4096));
    let iothreads: Vec<_> = (0..4)
        .map(|i| Iothread::spawn(&format!("io{i}")).unwrap())
        .collect();
    let event_loop = EventLoop::new("test").unwrap();
    event_loop
        .block_on(join_all(iothreads.iter().enumerate().map(|(i, io)| {
            let driver = Arc::clone(&driver);
            io.handle().call(move || async move {
                // Every fourth sector is mine: each block has two of each.
                for round in 0..10u8 {
                    join_all((i..64).step_by(4).map(|sector| {
                        let iov = memory(512, 0, 512);
                        iov.fill(round.wrapping_mul(31) ^ sector as u8);
                        driver.write(sector as u64 * 512, iov, WriteFlags::default())
                    }))
                    .await
                    .into_iter()
                    .for_each(Result::unwrap);
                }
            })
        })))
        .into_iter()
        .for_each(Result::unwrap);
    let content = std::fs::read(image.path()).unwrap();
    for sector in 0..64 {
        let expected = 9u8.wrapping_mul(31) ^ sector as u8;
        assert!(
            content[sector * 512..][..512]
                .iter()
                .all(|b| *b == expected),
            "sector {sector}"
        );
    }
}

#[test]
fn reads_past_the_end_of_an_odd_file_give_zeroes() {
    for place in places() {
        for direct in [false, true] {
            let image = image_in(&place, 0);
            std::fs::write(image.path(), [7; 1000]).unwrap();
            let driver = open_image(image.path(), direct);
            assert_eq!(driver.size(), 1000);
            let event_loop = EventLoop::new("test").unwrap();
            event_loop.block_on(async {
                let iov = memory(1024, 0, 4096);
                iov.fill(0xee);
                driver.read(0, iov.clone()).await.unwrap();
                assert!(iov.slice(1000, 24).is_zero());
                let mut data = [0; 1000];
                iov.copy_to(0, &mut data);
                assert_eq!(data, [7; 1000]);
                let extent = driver.block_status(0, 1024).await.unwrap();
                assert!(extent.flags.data);
                // The last sector can be written whole.
                iov.fill(8);
                let write = driver.write(512, iov.slice(0, 512), WriteFlags::default());
                write.await.unwrap();
            });
            let content = std::fs::read(image.path()).unwrap();
            assert_eq!(content.len(), 1024);
            assert!(content[512..].iter().all(|b| *b == 8));
        }
    }
}

#[test]
fn large_misaligned_transfers_go_in_pieces() {
    const LEN: usize = (5 << 20) + 512;
    let image = image_in(&disk(), 8 << 20);
    let driver = with_blocks(open_image(image.path(), true), 4096, 4096);
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let data: Vec<u8> = (0..LEN).map(|i| (i / 512 * 7 + i) as u8).collect();
        let iov = memory(LEN, 1, 100_000);
        iov.copy_from(0, &data);
        let flags = WriteFlags {
            fua: true,
            ..WriteFlags::default()
        };
        driver.write(512 * 3, iov, flags).await.unwrap();
        let back = memory(LEN, 3, 70_000);
        driver.read(512 * 3, back.clone()).await.unwrap();
        let mut read = vec![0; LEN];
        back.copy_to(0, &mut read);
        assert!(read == data);
    });
}

#[test]
fn a_dropped_rewrite_keeps_its_block_locked_until_it_is_done() {
    use futures_util::FutureExt;
    let image = image_in(&disk(), SIZE);
    let driver = with_blocks(open_image(image.path(), true), 4096, 4096);
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        for cut in 0..8 {
            let iov = memory(512, 0, 512);
            iov.fill(1);
            let mut write = driver.write(0, iov, WriteFlags::default());
            // Drops it after so many turns: before, in and after its read and its
            // write.
            for _ in 0..cut {
                if write.as_mut().now_or_never().is_some() {
                    break;
                }
                crate::runtime::yield_now().await;
            }
            drop(write);
            let iov = memory(512, 0, 512);
            iov.fill(cut + 2);
            driver.write(512, iov, WriteFlags::default()).await.unwrap();
            // What the dropped one left running is done before the lock is free.
            let content = std::fs::read(image.path()).unwrap();
            assert!(content[512..1024].iter().all(|b| *b == cut + 2));
        }
    });
}

#[test]
fn what_a_resize_cuts_off_is_a_hole_when_the_file_grows_again() {
    for place in places() {
        let image = image_in(&place, SIZE);
        let driver = open_image(image.path(), false);
        EventLoop::new("test").unwrap().block_on(async {
            let ones = memory(SIZE as usize, 0, SIZE as usize);
            ones.fill(1);
            driver.write(0, ones, WriteFlags::default()).await.unwrap();
            let extent = driver.block_status(0, SIZE).await.unwrap();
            assert!(extent.flags.data);
            driver.resize(4096).await.unwrap();
            driver.resize(SIZE).await.unwrap();
            let extent = driver.block_status(8192, 4096).await.unwrap();
            assert_eq!((extent.len, extent.flags.zero), (4096, true));
        });
    }
}
