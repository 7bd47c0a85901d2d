//! Writes of several queues on several iothreads around the beginning of a mirror: before
//! the filter is in, while it goes in, while it is found out what there is to copy, and
//! when the copy mode changes. Each is held where it matters. None is lost.

use block::IoOp;
use block::test_storage::{HoldAt, Match};

use super::begin::Chain;
use super::*;
use crate::{CopyMode, JobChange};

const CHUNK: u64 = 64 * KIB;
const MODES: [CopyMode; 2] = [CopyMode::Background, CopyMode::WriteBlocking];
const HELD: [Option<HoldAt>; 3] = [None, Some(HoldAt::Start), Some(HoldAt::End)];

type Write = LocalTask<Result<(), IoError>>;

/// Begins a write on each iothread of the guest: 4 KiB in each of these chunks.
fn write_everywhere(rig: &Rig, disk: &Arc<Backend>, chunks: [u64; 4], byte: u8) -> Vec<Write> {
    let begin = |(thread, chunk): (usize, u64)| {
        let disk = Arc::clone(disk);
        rig.guest(thread, move |_| async move {
            let payload = filled(4096, byte);
            disk.write(chunk * CHUNK + 8192, payload, WriteFlags::default())
                .await
        })
    };
    chunks.into_iter().enumerate().map(begin).collect()
}

async fn all_end(writes: Vec<Write>) {
    for write in writes {
        write.await.expect("a guest write succeeds");
    }
}

/// Writes that are on their way when the mirror is asked for, and others that come while
/// those are waited for, so that they go through the filter at once when it is there.
#[test]
fn writes_before_and_while_the_filter_goes_in_arrive() {
    for mode in MODES {
        for at in [HoldAt::Start, HoldAt::End] {
            for full in [true, false] {
                with_rig(|rig| async move {
                    let chain = Chain::new(&rig);
                    let (storage, disk) = match full {
                        true => (rig.source.clone(), Arc::clone(&rig.disk)),
                        false => (chain.upper.clone(), Arc::clone(&chain.disk)),
                    };
                    storage.hold_at(Match::op(IoOp::Write), at);
                    let before = write_everywhere(&rig, &disk, [0, 3, 9, 30], 5);
                    storage.wait_held(4).await;
                    let spec = match full {
                        true => MirrorSpec {
                            copy_mode: mode,
                            ..rig.spec()
                        },
                        false => chain.spec(mode),
                    };
                    let there = Rc::clone(&rig);
                    let start = runtime::spawn_local(async move { there.start(spec).await });
                    rig.until(|| disk.is_drained()).await;
                    let meanwhile = write_everywhere(&rig, &disk, [1, 4, 10, 31], 6);
                    assert!(!start.is_finished() && storage.held() == 4);
                    storage.release_all();
                    let key = start.await;
                    all_end(before).await;
                    all_end(meanwhile).await;
                    rig.wait_for(JobStatus::Ready).await;
                    rig.pivot(key).await;
                    match full {
                        true => rig.assert_equal(),
                        false => chain.assert_equal().await,
                    }
                });
            }
        }
    }
}

/// The layers are looked through: one chunk is just being looked at. Writes to what was
/// passed, to that, and to what comes later end before the look, or go on past it, until
/// the mirror is ready.
#[test]
fn writes_while_it_is_found_out_what_there_is_to_copy_arrive() {
    for mode in MODES {
        for held in HELD {
            for look in [HoldAt::Start, HoldAt::End] {
                with_rig(|rig| async move {
                    let chain = Chain::new(&rig);
                    let at = 5 * CHUNK;
                    let looks = Match::op(IoOp::BlockStatus).range(at..at + 1);
                    chain.upper.hold_at(looks, look);
                    let key = rig.start(chain.spec(mode)).await;
                    chain.upper.wait_held(1).await;
                    if let Some(held) = held {
                        chain.upper.hold_at(Match::op(IoOp::Write), held);
                    }
                    let writes = write_everywhere(&rig, &chain.disk, [2, 5, 6, 40], 9);
                    let mut writes = Some(writes);
                    match held {
                        Some(_) => chain.upper.wait_held(5).await,
                        None => all_end(writes.take().unwrap_or_default()).await,
                    }
                    // The oldest is the look.
                    assert_eq!(chain.upper.held_requests()[0], (IoOp::BlockStatus, at));
                    chain.upper.stop_holding();
                    chain.upper.release_one();
                    rig.wait_for(JobStatus::Ready).await;
                    chain.upper.release_all();
                    all_end(writes.unwrap_or_default()).await;
                    rig.pivot(key).await;
                    for chunk in [2, 5, 6, 40] {
                        assert_eq!(chain.target.peek(chunk * CHUNK + 8192, 1), [9]);
                    }
                    chain.assert_equal().await;
                });
            }
        }
    }
}

/// The target is made zero first: writes before, below and behind the request that does it.
#[test]
fn writes_while_the_target_is_zeroed_arrive() {
    for mode in MODES {
        for held in HELD {
            for zeroed in [HoldAt::Start, HoldAt::End] {
                with_rig(|rig| async move {
                    let limits = block::Limits {
                        can_zero_fast: true,
                        ..block::Limits::default()
                    };
                    let old = TestStorage::with_limits(SIZE, limits);
                    scribble(&old);
                    rig.source.poke(CHUNK, &[3; 4096]);
                    let options = NodeOptions {
                        discard: DiscardMode::Unmap,
                        ..NodeOptions::default()
                    };
                    let target = rig.graph.add_node(Some("fast"), old.driver(), options);
                    old.hold_at(Match::op(IoOp::WriteZeroes), zeroed);
                    let key = rig
                        .start(MirrorSpec {
                            target: target.expect("target"),
                            copy_mode: mode,
                            ..rig.spec()
                        })
                        .await;
                    old.wait_held(1).await;
                    if let Some(held) = held {
                        rig.source.hold_at(Match::op(IoOp::Write), held);
                    }
                    let writes = write_everywhere(&rig, &rig.disk, [0, 1, 20, 63], 9);
                    // In write-blocking mode they wait for their range.
                    if held.is_some() && mode == CopyMode::Background {
                        rig.source.wait_held(4).await;
                    }
                    old.release_all();
                    if mode == CopyMode::WriteBlocking && held.is_some() {
                        rig.source.wait_held(4).await;
                    }
                    rig.source.release_all();
                    all_end(writes).await;
                    rig.wait_for(JobStatus::Ready).await;
                    rig.act(|jobs| jobs.complete(key));
                    rig.wait_for(JobStatus::Null).await;
                    assert_eq!(rig.completed(), Some(None));
                    assert!(rig.source.snapshot() == old.snapshot());
                });
            }
        }
    }
}

/// A write that began in background mode ends after an overlapping one that came after the
/// change to write-blocking, or before it.
#[test]
fn writes_in_flight_while_the_copy_mode_changes_arrive() {
    for at in [HoldAt::Start, HoldAt::End] {
        for first_ends_last in [false, true] {
            with_rig(|rig| async move {
                scribble(&rig.source);
                let key = rig.ready(rig.spec()).await;
                rig.source.hold_at(Match::op(IoOp::Write), at);
                let before = write_everywhere(&rig, &rig.disk, [0, 1, 2, 3], 5);
                rig.source.wait_held(4).await;
                let request = rig
                    .jobs
                    .lock()
                    .change(key, Some(JobChange::CopyMode(CopyMode::WriteBlocking)));
                request
                    .expect("the verb is accepted")
                    .apply()
                    .expect("it can");
                if first_ends_last {
                    rig.source.stop_holding();
                    rig.write(0, 4 * CHUNK, 6).await;
                    rig.source.release_all();
                    all_end(before).await;
                } else {
                    let after = rig.begin_write(0, 4 * CHUNK, 6);
                    rig.source.wait_held(5).await;
                    rig.source.release_all();
                    all_end(before).await;
                    after.await.expect("a guest write succeeds");
                }
                rig.until(|| rig.jobs.query()[0].actively_synced == Some(true))
                    .await;
                rig.assert_equal();
                rig.write(CHUNK, 4096, 8).await;
                rig.assert_equal();
                rig.pivot(key).await;
                rig.assert_on_target();
            });
        }
    }
}
