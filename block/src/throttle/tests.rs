//! Rates and turns by a virtual clock; waiting, drain and threads for real.

use std::sync::mpsc;
use std::task::Waker;

use proptest::prelude::*;

use super::limits::ThrottleLimits;
use super::schedule::{Schedule, Turn};
use super::*;
use crate::driver::{CancelReach, ChildRole};
use crate::drivers::throttle::ThrottleDriver;
use crate::node::{Child, Node, NodeOptions};
use crate::runtime::{EventLoop, Iothread, spawn_local};
use crate::test_storage::TestStorage;
use crate::{AlignedBuffer, Graph, WriteFlags};

fn rate(rate: u64) -> RateLimit {
    RateLimit {
        rate,
        ..RateLimit::default()
    }
}

fn bps_write(limit: RateLimit) -> ThrottleLimits {
    ThrottleLimits {
        bps_write: limit,
        ..ThrottleLimits::default()
    }
}

/// A schedule with a clock that a test moves.
struct Simulation {
    schedule: Schedule,
    now: Duration,
    waiting: Vec<(usize, usize)>,
}

impl Simulation {
    fn new(limits: ThrottleLimits) -> Self {
        Self {
            schedule: Schedule::new(limits, Duration::ZERO),
            now: Duration::ZERO,
            waiting: Vec::new(),
        }
    }

    /// Whether the request went through at once; else it waits as `name`.
    fn arrive(&mut self, name: usize, member: usize, direction: Direction, len: u64) -> bool {
        let (ticket, _wakes) =
            self.schedule
                .arrive(member, direction, len, Waker::noop(), self.now);
        if let Some(ticket) = ticket {
            self.waiting.push((name, ticket));
        }
        ticket.is_none()
    }

    /// Lets those go that may, in whatever order they are asked, and gives their
    /// names and the time at which somebody has to be asked again.
    fn step(&mut self) -> (Vec<usize>, Option<Duration>) {
        let mut gone = Vec::new();
        loop {
            let before = gone.len();
            let mut next: Option<Duration> = None;
            for (name, ticket) in std::mem::take(&mut self.waiting) {
                match self.schedule.ask(ticket, Waker::noop(), self.now).0 {
                    Turn::Go => gone.push(name),
                    Turn::Next(at) => {
                        next = Some(next.map_or(at, |next| next.min(at)));
                        self.waiting.push((name, ticket));
                    }
                    Turn::Queued => self.waiting.push((name, ticket)),
                }
            }
            if gone.len() == before {
                return (gone, next);
            }
        }
    }

    /// Lets all go in their time; gives names in the order in which they went.
    fn run(&mut self) -> Vec<usize> {
        let mut order = Vec::new();
        while !self.waiting.is_empty() {
            let (gone, next) = self.step();
            order.extend(gone);
            if let Some(at) = next {
                assert!(at > self.now, "somebody could have gone before");
                self.now = at;
            }
        }
        order
    }
}

/// Time until `count` writes of `len` bytes, that all come at once, have gone.
fn time_for(limits: ThrottleLimits, count: usize, len: u64) -> f64 {
    let mut simulation = Simulation::new(limits);
    let member = simulation.schedule.add_member();
    for name in 0..count {
        simulation.arrive(name, member, Direction::Write, len);
    }
    simulation.run();
    simulation.now.as_secs_f64()
}

#[track_caller]
fn assert_near(value: f64, expected: f64) {
    assert!(
        (value - expected).abs() < 0.001,
        "{value} is not {expected}"
    );
}

#[test]
fn bytes_go_at_their_rate_after_a_tenth_of_a_second_for_free() {
    // Free: 1000 bytes and the request that makes it more; the last one goes when
    // those before it are paid for but the free part.
    let limits = bps_write(rate(10_000));
    assert_near(time_for(limits, 101, 1000), (100_000.0 - 1000.0) / 10_000.0);
    let total = ThrottleLimits {
        bps_total: rate(10_000),
        ..ThrottleLimits::default()
    };
    assert_near(time_for(total, 101, 1000), 9.9);
    let reads = ThrottleLimits {
        bps_read: rate(10_000),
        ..ThrottleLimits::default()
    };
    assert_near(time_for(reads, 101, 1000), 0.0);
}

#[test]
fn requests_count_by_number_and_large_ones_as_several() {
    let mut limits = ThrottleLimits {
        iops_write: rate(100),
        ..ThrottleLimits::default()
    };
    assert_near(time_for(limits, 1011, 1 << 20), 10.0);
    limits.iops_size = 4096;
    // Each as two and a half; those of less as one.
    assert_near(time_for(limits, 405, 10_240), (404.0 * 2.5 - 10.0) / 100.0);
    assert_near(time_for(limits, 111, 512), 1.0);
}

#[test]
fn a_burst_lasts_as_long_as_it_may_and_no_longer() {
    // One second's worth of bursts goes at once.
    let short = RateLimit {
        rate: 1000,
        burst: 5000,
        burst_seconds: 1,
    };
    assert_near(time_for(bps_write(short), 51, 100), 0.0);
    assert_near(time_for(bps_write(short), 61, 100), 1.0);
    // Three seconds' worth goes at the rate of the burst.
    let long = bps_write(RateLimit {
        burst_seconds: 3,
        ..short
    });
    assert_near(time_for(long, 106, 100), 2.0);
    // While it lasts the bucket fills by the difference, so 5000 a second go for
    // longer than 3 s; what comes after goes at the long-run rate.
    let all = time_for(long, 401, 100);
    assert_near(all, (40_000.0 - 15_000.0) / 1000.0);
}

#[test]
fn who_has_paused_may_not_save_up_more_than_the_burst() {
    let mut simulation = Simulation::new(bps_write(rate(10_000)));
    let member = simulation.schedule.add_member();
    simulation.now = Duration::from_secs(3600);
    let at_once = (0..10)
        .take_while(|name| simulation.arrive(*name, member, Direction::Write, 500))
        .count();
    assert_eq!(at_once, 3);
}

#[test]
fn members_take_turns_whatever_they_have_queued() {
    let mut simulation = Simulation::new(bps_write(rate(1000)));
    let members: Vec<usize> = (0..3).map(|_| simulation.schedule.add_member()).collect();
    assert!(simulation.arrive(99, members[0], Direction::Write, 1000));
    // The first is greedy, the last is late.
    for name in 0..6 {
        assert!(!simulation.arrive(name, members[0], Direction::Write, 1000));
    }
    for name in 10..12 {
        assert!(!simulation.arrive(name, members[1], Direction::Write, 1000));
    }
    assert!(!simulation.arrive(20, members[2], Direction::Write, 1000));
    assert_eq!(simulation.run(), [0, 10, 20, 1, 11, 2, 3, 4, 5]);
}

#[test]
fn reads_and_writes_take_turns_where_they_share_a_limit() {
    let mut simulation = Simulation::new(ThrottleLimits {
        iops_total: rate(1),
        ..ThrottleLimits::default()
    });
    let member = simulation.schedule.add_member();
    assert!(simulation.arrive(99, member, Direction::Write, 512));
    for name in 0..3 {
        simulation.arrive(name, member, Direction::Write, 512);
        simulation.arrive(name + 10, member, Direction::Read, 512);
    }
    let order = simulation.run();
    let kinds: Vec<bool> = order.iter().map(|name| *name >= 10).collect();
    assert!(kinds.windows(2).all(|pair| pair[0] != pair[1]), "{order:?}");
}

#[test]
fn reads_do_not_wait_for_a_limit_on_writes() {
    let mut simulation = Simulation::new(bps_write(rate(1)));
    let member = simulation.schedule.add_member();
    for name in 0..3 {
        simulation.arrive(name, member, Direction::Write, 1 << 20);
    }
    assert!(!simulation.arrive(10, member, Direction::Read, 1 << 20));
    assert_eq!(simulation.step().0, [10]);
}

#[test]
fn new_limits_hold_for_those_who_wait() {
    let mut simulation = Simulation::new(bps_write(rate(1)));
    let member = simulation.schedule.add_member();
    for name in 0..5 {
        simulation.arrive(name, member, Direction::Write, 1 << 40);
    }
    let (_, next) = simulation.step();
    assert!(next.unwrap() > Duration::from_secs(1 << 33));
    let _wakes = simulation
        .schedule
        .set_limits(bps_write(rate(1 << 40)), simulation.now);
    assert_eq!(simulation.run(), [1, 2, 3, 4]);
    assert_near(simulation.now.as_secs_f64(), 2.9);
    for name in 0..5 {
        simulation.arrive(name, member, Direction::Write, 1 << 40);
    }
    let _wakes = simulation
        .schedule
        .set_limits(ThrottleLimits::default(), simulation.now);
    assert_eq!(simulation.step().0.len(), 5);
}

#[test]
fn limits_that_make_no_sense_are_refused_in_qemus_words() {
    let burst = |rate: u64, burst: u64, burst_seconds: u32| {
        bps_write(RateLimit {
            rate,
            burst,
            burst_seconds,
        })
    };
    let cases = [
        (
            ThrottleLimits {
                bps_total: rate(1),
                ..bps_write(rate(1))
            },
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
        (
            ThrottleLimits {
                iops_size: 1,
                ..bps_write(rate(1))
            },
            "iops size requires an iops value to be set",
        ),
        (
            burst(1_000_000_000_000_001, 0, 1),
            "bps/iops/max values must be within [0, 1000000000000000]",
        ),
        (burst(1, 2, 0), "the burst length cannot be 0"),
        (burst(1, 0, 2), "burst length set without burst rate"),
        (
            burst(1, 1_000_000_000_000_000, 2),
            "burst length too high for this burst rate",
        ),
        (
            burst(0, 2, 1),
            "bps_max/iops_max require corresponding bps/iops values",
        ),
        (
            burst(2, 1, 1),
            "bps_max/iops_max cannot be lower than bps/iops",
        ),
    ];
    for (limits, text) in cases {
        assert_eq!(limits.check().unwrap_err().to_string(), text);
    }
    assert_eq!(burst(1, 500_000_000_000_000, 2).check(), Ok(()));
}

proptest! {
    /// What goes through in any time is at most what that time and the bucket
    /// allow, and one request; and nobody waits when nothing is owed.
    #[test]
    fn no_pattern_of_requests_beats_the_limit(
        bytes_per_second in 1u64..1 << 40,
        requests in prop::collection::vec((0usize..3, 1u64..1 << 32, 0u64..1 << 32), 1..60),
    ) {
        let mut simulation = Simulation::new(ThrottleLimits {
            bps_total: rate(bytes_per_second),
            ..ThrottleLimits::default()
        });
        let members: Vec<usize> = (0..3).map(|_| simulation.schedule.add_member()).collect();
        let mut through: u128 = 0;
        let check = |through: u128, last: u64, now: Duration| {
            let allowed = u128::from(bytes_per_second) * now.as_nanos() / 1_000_000_000
                + u128::from(bytes_per_second / 10) + u128::from(last) + 2;
            prop_assert!(through <= allowed, "{} > {} at {:?}", through, allowed, now);
            Ok(())
        };
        for (name, (member, len, pause)) in requests.iter().enumerate() {
            simulation.now += Duration::from_nanos(*pause);
            let direction = if len % 2 == 0 { Direction::Read } else { Direction::Write };
            if simulation.arrive(name, members[*member], direction, *len) {
                through += u128::from(*len);
                check(through, *len, simulation.now)?;
            }
            loop {
                let (gone, _) = simulation.step();
                if gone.is_empty() {
                    break;
                }
                let largest = gone.iter().map(|name| requests[*name].1).max().unwrap_or(0);
                through += gone.iter().map(|name| u128::from(requests[*name].1)).sum::<u128>();
                check(through, largest, simulation.now)?;
            }
        }
        let all: u128 = requests.iter().map(|r| u128::from(r.1)).sum();
        let left: u128 = simulation.waiting.iter().map(|(name, _)| u128::from(requests[*name].1)).sum();
        prop_assert_eq!(through + left, all);
        simulation.run();
        prop_assert_eq!(simulation.schedule.queued(), 0);
    }
}

const BLOCK: u64 = 4096;

/// A throttle filter over a storage; the group lets nothing through but the first
/// block, for as long as a test may run.
fn stuck(storage: &TestStorage) -> (Arc<ThrottleGroup>, Arc<Node>) {
    let group = Arc::new(ThrottleGroup::new(bps_write(rate(1))));
    (Arc::clone(&group), filter(&group, storage))
}

fn filter(group: &Arc<ThrottleGroup>, storage: &TestStorage) -> Arc<Node> {
    let below = Node::new("below", storage.driver(), NodeOptions::default());
    let child = Child::new(ChildRole::File, below);
    let driver = ThrottleDriver::new(Arc::clone(group), child);
    Node::new("throttle", Box::new(driver), NodeOptions::default())
}

async fn write(node: &Node, block: u64) {
    let iov = AlignedBuffer::new(BLOCK as usize).io_vec(BLOCK as usize);
    node.write(block * BLOCK, iov, WriteFlags::default())
        .await
        .unwrap();
}

/// Lets everything run that can.
async fn settle() {
    for _ in 0..20 {
        runtime::yield_now().await;
    }
}

#[test]
fn a_queued_request_that_is_given_up_counts_for_nothing_and_loses_nobodys_turn() {
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let storage = TestStorage::new(1 << 20);
        let (group, node) = stuck(&storage);
        write(&node, 0).await;
        let tasks: Vec<_> = (1..4)
            .map(|block| {
                let node = Arc::clone(&node);
                spawn_local(async move { write(&node, block).await })
            })
            .collect();
        settle().await;
        assert_eq!(group.queued(), 3);
        let mut tasks = tasks.into_iter();
        // The one whose turn it is, which holds the timer.
        tasks.next().unwrap().cancel().await;
        assert_eq!(group.queued(), 2);
        group.set_limits(bps_write(rate(BLOCK * 1000))).unwrap();
        for task in tasks {
            task.await;
        }
        assert_eq!(group.queued(), 0);
        assert_eq!(storage.ended().len(), 3);
    });
}

#[test]
fn a_limit_does_not_delay_a_drained_section_and_holds_again_afterwards() {
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let graph = Graph::new();
        let storage = TestStorage::new(1 << 20);
        graph
            .add_node(Some("below"), storage.driver(), NodeOptions::default())
            .unwrap();
        let group = graph
            .throttle_groups()
            .create("g", bps_write(rate(1)))
            .unwrap();
        let node = graph
            .blockdev_add(crate::BlockdevOptions {
                node_name: Some("t".into()),
                ..crate::BlockdevOptions::new(crate::DriverOptions::Throttle(
                    crate::ThrottleOptions {
                        group: "g".into(),
                        file: crate::BlockdevRef::Name("below".into()),
                    },
                ))
            })
            .await
            .unwrap();
        let writer = crate::Permissions {
            need: crate::Perm::WRITE,
            share: crate::Perm::ALL,
        };
        let backend = graph.attach("", &node, writer, None).unwrap();
        let spawn_write = |block: u64| {
            let backend = Arc::clone(&backend);
            spawn_local(async move {
                let iov = AlignedBuffer::new(BLOCK as usize).io_vec(BLOCK as usize);
                backend
                    .write(block * BLOCK, iov, WriteFlags::default())
                    .await
                    .unwrap();
            })
        };
        spawn_write(0).await;
        let queued: Vec<_> = (1..5).map(&spawn_write).collect();
        settle().await;
        assert_eq!(group.queued(), 4);
        for below in [false, true] {
            let at = if below {
                graph.find_node("below").unwrap()
            } else {
                Arc::clone(&node)
            };
            // The section would time out if it had to wait for the limit.
            let drained = graph.drain(&at, &[]).await.unwrap();
            assert_eq!((group.queued(), backend.in_flight()), (0, 0));
            drop(drained);
        }
        for task in queued {
            task.await;
        }
        let late = spawn_write(5);
        settle().await;
        assert_eq!(group.queued(), 1);
        node.cancel_in_flight(CancelReach::Waiting);
        late.await;
    });
}

#[test]
fn a_group_is_in_use_until_its_last_node_is_closed() {
    let groups = ThrottleGroups::default();
    let group = groups.create("g", ThrottleLimits::default()).unwrap();
    assert_eq!(
        groups.create("g", ThrottleLimits::default()).unwrap_err(),
        GroupError::Exists
    );
    let storage = TestStorage::new(1 << 20);
    let (first, second) = (filter(&group, &storage), filter(&group, &storage));
    assert_eq!(groups.remove("g"), Err(GroupError::InUse));
    drop(first);
    assert_eq!(groups.remove("g"), Err(GroupError::InUse));
    // Closed, and still held by somebody.
    second.driver().close();
    assert_eq!(groups.remove("g"), Ok(()));
    assert_eq!(groups.remove("g"), Err(GroupError::NotFound));
    assert!(groups.find("g").is_none());
}

#[test]
fn three_iothreads_share_a_limit_and_nobody_is_forgotten() {
    const WRITES: u64 = 400;
    let group = Arc::new(ThrottleGroup::new(ThrottleLimits {
        iops_write: rate(10_000),
        ..ThrottleLimits::default()
    }));
    let storage = TestStorage::new(1 << 20);
    let (done, ended) = mpsc::channel();
    let began = Instant::now();
    let threads: Vec<_> = (0..3)
        .map(|index| {
            let thread = Iothread::spawn(&format!("io{index}")).unwrap();
            let node = filter(&group, &storage);
            let done = done.clone();
            thread.handle().spawn(move || async move {
                let mut tasks = Vec::new();
                for number in 0..WRITES {
                    let node = Arc::clone(&node);
                    let task = spawn_local(async move { write(&node, number % 256).await });
                    // Some give up, in the queue or just let through.
                    if number % 7 == 3 {
                        runtime::yield_now().await;
                        task.cancel().await;
                    } else {
                        tasks.push(task);
                    }
                }
                for task in tasks {
                    task.await;
                }
                done.send(()).unwrap();
            });
            thread
        })
        .collect();
    // Meanwhile main changes the limits, which lets some through at once.
    let mut running = threads.len();
    let mut fast = false;
    while running > 0 {
        match ended.recv_timeout(Duration::from_millis(1)) {
            Ok(()) => running -= 1,
            Err(_) => {
                fast = !fast;
                let iops_write = rate(if fast { 100_000 } else { 10_000 });
                let limits = ThrottleLimits {
                    iops_write,
                    ..ThrottleLimits::default()
                };
                group.set_limits(limits).unwrap();
            }
        }
        let waited = began.elapsed();
        assert!(waited < Duration::from_secs(60), "requests are stuck");
    }
    assert_eq!(group.queued(), 0);
    let least = 3 * (WRITES - WRITES.div_ceil(7));
    assert!(storage.ended().len() as u64 >= least);
    for thread in threads {
        thread.stop();
    }
}
