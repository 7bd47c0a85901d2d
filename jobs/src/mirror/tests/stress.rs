//! Random runs: four guest iothreads write self-describing blocks from before the
//! start to after the end, and what the images hold is compared with what they
//! wrote.
//!
//! Each writer owns every fourth block, has one request in flight at a time, and
//! keeps a list of what it did. So the state of its blocks at any moment is what
//! a beginning of its list leaves.

use std::sync::atomic::{AtomicBool, Ordering};

use block::test_storage::Match;
use block::{IoOp, SECTOR_SIZE};

use crate::{CopyMode, JobChange, JobStatus};

use super::*;

/// Disk and blocks: small, so that everybody meets everybody.
const DISK: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const WRITERS: u64 = 4;

/// SplitMix64: random numbers that can be had again by their seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// One request of a writer: what a range of sectors holds after it.
#[derive(Clone, Copy, Debug)]
struct Step {
    offset: u64,
    len: u64,
    /// 0 for zeroes.
    stamp: u64,
}

impl Step {
    /// The bytes that belong there.
    fn fill(&self, image: &mut [u8]) {
        for sector in 0..self.len / SECTOR_SIZE {
            let at = (self.offset + sector * SECTOR_SIZE) as usize;
            image[at..at + SECTOR_SIZE as usize].copy_from_slice(&describe(at as u64, self.stamp));
        }
    }
}

/// A sector that says where it is and which request wrote it.
fn describe(offset: u64, stamp: u64) -> [u8; SECTOR_SIZE as usize] {
    let mut sector = [0; SECTOR_SIZE as usize];
    if stamp != 0 {
        for (n, word) in sector.chunks_exact_mut(8).enumerate() {
            let value = offset.wrapping_mul(0x1000_0001) ^ stamp.rotate_left(n as u32);
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    sector
}

/// Writes until told to stop; gives all it did, in order.
async fn writer(disk: Arc<Backend>, number: u64, seed: u64, stop: Arc<AtomicBool>) -> Vec<Step> {
    let mut random = Random(seed ^ (number << 32));
    let mut steps = Vec::new();
    let sectors = BLOCK / SECTOR_SIZE;
    while !stop.load(Ordering::Relaxed) {
        let block = random.below(DISK / BLOCK / WRITERS) * WRITERS + number;
        let first = random.below(sectors);
        let count = 1 + random.below(sectors - first);
        let zero = random.below(5) == 0;
        let step = Step {
            offset: block * BLOCK + first * SECTOR_SIZE,
            len: count * SECTOR_SIZE,
            stamp: if zero {
                0
            } else {
                (steps.len() as u64 + 1) * WRITERS + number
            },
        };
        let done = if zero {
            let flags = ZeroFlags {
                may_unmap: random.below(2) == 0,
                ..ZeroFlags::default()
            };
            disk.write_zeroes(step.offset, step.len, flags).await
        } else {
            let iov = AlignedBuffer::new(step.len as usize).io_vec(step.len as usize);
            for sector in 0..count {
                let at = step.offset + sector * SECTOR_SIZE;
                iov.slice((sector * SECTOR_SIZE) as usize, SECTOR_SIZE as usize)
                    .copy_from(0, &describe(at, step.stamp));
            }
            disk.write(step.offset, iov, WriteFlags::default()).await
        };
        done.expect("no storage fails here");
        steps.push(step);
        if random.below(8) == 0 {
            runtime::yield_now().await;
        }
    }
    steps
}

/// Bytes of one writer's blocks.
fn blocks_of(image: &[u8], number: u64) -> Vec<u8> {
    image
        .chunks_exact(BLOCK as usize)
        .skip(number as usize)
        .step_by(WRITERS as usize)
        .flatten()
        .copied()
        .collect()
}

/// What the disk held before, and after the first `count` steps.
fn replay(before: &[u8], steps: &[Step]) -> Vec<u8> {
    let mut image = before.to_vec();
    for step in steps {
        step.fill(&mut image);
    }
    image
}

/// Whether some beginning of `steps` leaves `image` in the writer's blocks.
fn is_a_moment(before: &[u8], steps: &[Step], image: &[u8], number: u64) -> bool {
    let wanted = blocks_of(image, number);
    let mut now = before.to_vec();
    if blocks_of(&now, number) == wanted {
        return true;
    }
    // Only the sectors that a step changes can begin or cease to differ.
    let mut differing: u64 = sectors_differing(&now, image, number);
    for step in steps {
        for sector in 0..step.len / SECTOR_SIZE {
            let at = (step.offset + sector * SECTOR_SIZE) as usize;
            let range = at..at + SECTOR_SIZE as usize;
            differing -= u64::from(now[range.clone()] != image[range.clone()]);
            now[range.clone()].copy_from_slice(&describe(at as u64, step.stamp));
            differing += u64::from(now[range.clone()] != image[range]);
        }
        if differing == 0 {
            return true;
        }
    }
    false
}

fn sectors_differing(a: &[u8], b: &[u8], number: u64) -> u64 {
    let (a, b) = (blocks_of(a, number), blocks_of(b, number));
    let size = SECTOR_SIZE as usize;
    a.chunks_exact(size)
        .zip(b.chunks_exact(size))
        .filter(|(a, b)| a != b)
        .count() as u64
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Pivot,
    SoftCancel,
    ForceCancel,
}

/// One life under load; everything in it follows from `seed`, but for the timing.
async fn round(rig: Rc<Rig>, seed: u64, end: End) {
    let mut random = Random(seed);
    for block in 0..DISK / BLOCK {
        if random.below(3) > 0 {
            rig.source
                .poke(block * BLOCK, &[random.next() as u8; BLOCK as usize]);
        }
        if random.below(3) == 0 {
            rig.target
                .poke(block * BLOCK, &[random.next() as u8; BLOCK as usize]);
        }
    }
    // Slow spots, so that requests meet and change their order.
    for _ in 0..4 {
        let start = random.below(DISK / BLOCK) * BLOCK;
        let op = [IoOp::Read, IoOp::Write, IoOp::BlockStatus][random.below(3) as usize];
        let storage = if random.below(2) == 0 {
            &rig.source
        } else {
            &rig.target
        };
        let time = Duration::from_micros(random.below(3000));
        storage.delay(Match::op(op).range(start..start + 8 * BLOCK), time);
    }
    let before = rig.source.snapshot();
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|number| {
            let (disk, stop) = (Arc::clone(&rig.disk), Arc::clone(&stop));
            let io = rig.guest[number as usize].handle().clone();
            runtime::spawn_local(async move {
                io.call(move || writer(disk, number, seed, stop))
                    .await
                    .expect("the iothread lives")
            })
        })
        .collect();

    let mut spec = rig.spec();
    spec.granularity = [512, 4096, 16384, 65536][random.below(4) as usize];
    spec.buf_size = [0, 65536, 1 << 20][random.below(3) as usize];
    if random.below(2) == 0 {
        spec.copy_mode = CopyMode::WriteBlocking;
    }
    let switch = spec.copy_mode == CopyMode::Background && random.below(3) == 0;
    let key = rig.start(spec).await;
    runtime::sleep(Duration::from_millis(random.below(10))).await;
    if random.below(2) == 0 {
        rig.act(|jobs| jobs.pause(key));
        runtime::sleep(Duration::from_millis(random.below(10))).await;
        rig.act(|jobs| jobs.resume(key));
    }
    if switch {
        let request = rig
            .jobs
            .lock()
            .change(key, Some(JobChange::CopyMode(CopyMode::WriteBlocking)));
        request.expect("accepted").apply().expect("possible");
    }
    if end != End::ForceCancel || random.below(2) == 0 {
        rig.wait_for(JobStatus::Ready).await;
        runtime::sleep(Duration::from_millis(random.below(20))).await;
    }
    match end {
        End::Pivot => rig.act(|jobs| jobs.complete(key)),
        End::SoftCancel => rig.act(|jobs| jobs.cancel(key, false)),
        End::ForceCancel => rig.act(|jobs| jobs.cancel(key, true)),
    }
    rig.wait_for(JobStatus::Null).await;
    runtime::sleep(Duration::from_millis(random.below(5))).await;
    stop.store(true, Ordering::Relaxed);
    let mut steps = Vec::new();
    for writer in writers {
        steps.push(writer.await);
    }
    let total: usize = steps.iter().map(Vec::len).sum();
    assert!(total > 0, "the guest did something");

    let (source, target) = (rig.source.snapshot(), rig.target.snapshot());
    let (live, copy) = match end {
        End::Pivot => {
            rig.assert_on_target();
            (target, Some(source))
        }
        End::SoftCancel => {
            rig.assert_on_source();
            (source, Some(target))
        }
        End::ForceCancel => {
            rig.assert_on_source();
            (source, None)
        }
    };
    for (number, steps) in steps.iter().enumerate() {
        let number = number as u64;
        let expected = replay(&before, steps);
        assert!(
            blocks_of(&expected, number) == blocks_of(&live, number),
            "seed {seed}, {end:?}: writer {number}'s {} writes are not all there",
            steps.len()
        );
        if let Some(copy) = &copy {
            assert!(
                is_a_moment(&before, steps, copy, number),
                "seed {seed}, {end:?}: the other image is of no moment of writer {number}"
            );
        }
    }
}

/// More rounds by `MIRROR_STRESS_ROUNDS`, other ones by `MIRROR_STRESS_SEED`.
fn rounds(end: End) {
    let number = |name: &str, default: u64| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse().ok())
            .unwrap_or(default)
    };
    let first = number("MIRROR_STRESS_SEED", 1);
    for seed in first..first + number("MIRROR_STRESS_ROUNDS", 4) {
        with_rig_of(DISK, |rig| round(rig, seed, end));
    }
}

#[test]
fn nothing_that_the_guest_wrote_is_lost_in_a_pivot() {
    rounds(End::Pivot);
}

#[test]
fn a_soft_cancel_under_load_leaves_a_copy_of_one_moment() {
    rounds(End::SoftCancel);
}

#[test]
fn nothing_that_the_guest_wrote_is_lost_in_a_forced_cancel() {
    rounds(End::ForceCancel);
}
