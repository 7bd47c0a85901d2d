//! Random histories of several jobs: whatever happens in whichever order, the
//! rules hold after each step and everything comes to an end.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::job::JobSettings;
use super::machine::{Announcement, Event, Hook};
use super::rig::{Rig, eio, mirror, settings};
use super::status::JobStatus;
use crate::event::{IoSide, OnError};
use crate::id::JobKey;

/// Who does something. A body acts only while it runs, main only if it was asked.
#[derive(Clone, Debug)]
enum Actor {
    User(Event),
    Drain { begin: bool },
    Body(Event),
    Timer,
    Main { fails: bool },
}

fn actors() -> impl Strategy<Value = (usize, Actor)> {
    use Actor::*;
    let failed = |policy| {
        Body(Event::IoFailed {
            side: IoSide::Write,
            errno: libc::ENOSPC,
            policy,
        })
    };
    let actor = prop_oneof![
        4 => Just(User(Event::Start)),
        1 => Just(User(Event::SetUpFailed)),
        3 => Just(User(Event::UserPause)),
        3 => Just(User(Event::UserResume)),
        1 => any::<bool>().prop_map(|force| User(Event::Cancel { force })),
        2 => Just(User(Event::Complete)),
        2 => Just(User(Event::Finalize)),
        2 => Just(User(Event::Dismiss)),
        2 => (0..3u64).prop_map(|speed| User(Event::SetSpeed(speed))),
        6 => any::<bool>().prop_map(|begin| Drain { begin }),
        1 => Just(Body(Event::OwnDrainBegin)),
        4 => Just(Body(Event::Park)),
        4 => any::<bool>().prop_map(|timer| Body(Event::Sleep { timer })),
        2 => Just(Body(Event::Looked)),
        2 => Just(Body(Event::Ready)),
        1 => Just(failed(OnError::Enospc)),
        1 => Just(failed(OnError::Ignore)),
        2 => Just(Body(Event::BodyReturned(Ok(())))),
        1 => Just(Body(Event::BodyReturned(Err(eio())))),
        3 => Just(Timer),
        6 => prop::bool::weighted(0.2).prop_map(|fails| Main { fails }),
    ];
    (0..3usize, actor)
}

/// What is known about a job from outside the machine.
#[derive(Default)]
struct Seen {
    drains: u32,
    prepared: u32,
    finished: u32,
    set_up_failed: bool,
    started: bool,
}

struct World {
    rig: Rig,
    keys: Vec<JobKey>,
    seen: BTreeMap<JobKey, Seen>,
}

impl World {
    fn new(flags: [bool; 4]) -> Self {
        let [grouped, manual, slow_dismiss, other_kind] = flags;
        let mut rig = Rig::default();
        let txn = grouped.then(|| rig.machine.new_txn());
        let kinds = [
            (
                JobSettings {
                    auto_finalize: !manual,
                    auto_dismiss: !slow_dismiss,
                    ..mirror("ja")
                },
                txn,
            ),
            (settings("jb"), txn),
            (
                JobSettings {
                    block_job: !other_kind,
                    ..mirror("jc")
                },
                None,
            ),
        ];
        let keys: Vec<JobKey> = kinds
            .into_iter()
            .map(|(settings, txn)| rig.create(settings, txn))
            .collect();
        let seen = keys.iter().map(|&key| (key, Seen::default())).collect();
        Self { rig, keys, seen }
    }

    fn seen(&mut self, key: JobKey) -> &mut Seen {
        self.seen.get_mut(&key).unwrap()
    }

    fn act(&mut self, which: usize, actor: Actor) {
        let key = self.keys[which];
        let busy = self.rig.machine.job(key).is_some_and(|job| job.busy);
        match actor {
            Actor::User(event) => {
                let start = event == Event::Start && self.rig.status(key) == JobStatus::Created;
                let failed =
                    event == Event::SetUpFailed && self.rig.status(key) == JobStatus::Created;
                self.seen(key).started |= start;
                self.seen(key).set_up_failed |= failed;
                self.step(key, event);
            }
            Actor::Drain { begin: true } => {
                self.seen(key).drains += 1;
                self.step(key, Event::DrainedBegin);
            }
            Actor::Drain { begin: false } => {
                if self.seen(key).drains > 0 {
                    self.seen(key).drains -= 1;
                    self.step(key, Event::DrainedEnd);
                }
            }
            Actor::Body(event) if busy => self.step(key, event),
            Actor::Timer if !busy => {
                // Fires only for a body that has yielded with a timer.
                if self.rig.machine.job(key).is_some_and(|job| job.sleeping) {
                    self.step(key, Event::WakeSelf);
                }
            }
            Actor::Body(_) | Actor::Timer => {}
            Actor::Main { fails } => self.main(fails),
        }
        self.check();
    }

    /// Main calls its next hook.
    fn main(&mut self, fails: bool) {
        let Some((key, hook)) = self.rig.hooks.pop_front() else {
            return;
        };
        match hook {
            Hook::Prepare => {
                self.seen(key).prepared += 1;
                let result = if fails { Err(eio()) } else { Ok(()) };
                self.step(key, Event::Prepared(result));
            }
            Hook::Finish { .. } => {
                self.seen(key).finished += 1;
                self.step(key, Event::Finished);
            }
            Hook::UserResume | Hook::Cancel { .. } | Hook::Complete | Hook::SetSpeed(_) => {}
        }
    }

    fn step(&mut self, key: JobKey, event: Event) {
        let asleep: Vec<JobKey> = self
            .rig
            .machine
            .jobs()
            .filter(|(_, job)| job.started && !job.busy && !job.deferred)
            .map(|(key, _)| key)
            .collect();
        let by_itself = matches!(event, Event::WakeSelf | Event::BodyReturned(_));
        self.rig.woken.clear();
        // Refusals change nothing; that is tested elsewhere.
        let _ = self.rig.try_step(key, event);
        for sleeper in asleep {
            let awake = self.rig.machine.job(sleeper).is_some_and(|job| job.busy);
            let told = self.rig.woken.contains(&sleeper);
            if sleeper != key || !by_itself {
                assert_eq!(awake, told, "{sleeper:?} was made busy and woken alike");
            }
        }
    }

    fn check(&self) {
        for (key, job) in self.rig.machine.jobs() {
            let seen = &self.seen[&key];
            let reasons = seen.drains + u32::from(job.user_paused) + u32::from(!job.started);
            assert_eq!(job.pause_count, reasons, "{key:?}: {job:?}");
            assert!(job.cancel_requested || !job.force_cancel);
            assert!(!(job.busy && (job.parked || job.deferred || !job.started)));
            // So a resume never finds a timer that it would cut short.
            assert!(!job.sleeping || !(job.busy || job.should_pause()));
            if job.started {
                let shown = matches!(job.status, JobStatus::Paused | JobStatus::Standby);
                assert_eq!(job.parked, shown, "{key:?}: {job:?}");
            }
            if job.parked && job.started {
                assert!(job.should_pause(), "parked for nothing: {job:?}");
            }
            assert_eq!(
                job.deferred && job.started,
                job.status.is_completed() && job.started
            );
            assert!(seen.prepared <= 1 && seen.finished <= 1);
        }
        let mut slow = BTreeMap::new();
        for (key, hook) in &self.rig.hooks {
            if matches!(hook, Hook::Prepare | Hook::Finish { .. }) {
                let txn = self.rig.job(*key).txn;
                *slow.entry(txn).or_insert(0) += 1;
            }
        }
        assert!(
            slow.values().all(|&n| n == 1),
            "one hook at a time: {slow:?}"
        );
    }

    /// Everything that waits gets what it waits for.
    fn wind_down(&mut self) {
        // Enough for three jobs, whatever each is waiting for.
        for _ in 0..100 {
            if self.rig.machine.jobs().next().is_none() {
                return;
            }
            for which in 0..self.keys.len() {
                let key = self.keys[which];
                let Some(job) = self.rig.machine.job(key) else {
                    continue;
                };
                match job.status {
                    JobStatus::Created | JobStatus::Paused | JobStatus::Standby => {
                        self.act(which, Actor::User(Event::Cancel { force: true }));
                    }
                    JobStatus::Pending => self.act(which, Actor::User(Event::Finalize)),
                    JobStatus::Concluded => self.act(which, Actor::User(Event::Dismiss)),
                    JobStatus::Running | JobStatus::Ready => {
                        self.act(which, Actor::User(Event::Cancel { force: true }));
                        self.act(which, Actor::Body(Event::BodyReturned(Ok(()))));
                    }
                    _ => {}
                }
                self.act(which, Actor::Main { fails: false });
            }
        }
    }

    /// The whole history, once all is over.
    fn check_end(&self) {
        assert_eq!(self.rig.machine.jobs().count(), 0, "{:?}", self.rig.machine);
        assert!(self.rig.machine.txns.is_empty(), "{:?}", self.rig.machine);
        for key in &self.keys {
            let seen = &self.seen[key];
            assert_eq!(self.rig.freed.iter().filter(|it| *it == key).count(), 1);
            assert_eq!(seen.finished, u32::from(!seen.set_up_failed));
            let mut status = JobStatus::Undefined;
            let mut ends = 0;
            let mut ready = 0;
            for (_, what) in self.rig.news.iter().filter(|(of, _)| of == key) {
                match what {
                    Announcement::Status(next) => {
                        assert!(status.may_become(*next), "{}", self.rig.told(*key));
                        assert_ne!(status, *next);
                        status = *next;
                    }
                    Announcement::Ready { .. } => ready += 1,
                    Announcement::Completed { .. } | Announcement::Cancelled { .. } => ends += 1,
                    Announcement::Pending
                    | Announcement::Stalled { .. }
                    | Announcement::Error { .. } => {}
                }
            }
            assert_eq!(status, JobStatus::Null);
            assert!(ready <= 1);
            assert!(ends <= 1);
            let told = self.rig.told(*key);
            if told.contains("COMPLETED") || told.contains("CANCELLED") {
                assert!(seen.started, "{told}");
            }
        }
    }
}

proptest! {
    #[test]
    fn whatever_happens_the_rules_hold_and_all_jobs_come_to_an_end(
        flags in any::<[bool; 4]>(),
        history in vec(actors(), 0..120),
    ) {
        let mut world = World::new(flags);
        for (which, actor) in history {
            world.act(which, actor);
        }
        world.wind_down();
        world.check_end();
    }
}
