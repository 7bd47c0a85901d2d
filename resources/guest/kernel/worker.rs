//! The workload on one disk.

use guest::cmdline::{Config, Order};
use guest::phase::{Operation, Phases};
use guest::random::Random;
use guest::record::{Record, Run};
use guest::report::{DiskReport, Mismatch};
use guest::sector::{self, SECTOR_BYTES};

use crate::clock::Clock;
use crate::disk::{Disk, Ended, Request};

const SECTOR: u64 = SECTOR_BYTES as u64;
/// Requests made between two looks at what has ended.
const BATCH: u32 = 16;
/// Blocks tried before another one is looked for later.
const TRIES: u32 = 8;

/// What all disks do at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Read what is there into the record.
    Adopt,
    /// Write the first part of the disk, once.
    Fill,
    /// The workload itself; the only stage that is counted.
    Work,
    /// Write the blocks whose content is open.
    Settle,
    /// One last flush.
    Flush,
    /// Read everything.
    Verify,
}

/// Why no more requests were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fed {
    /// As many are under way as may be.
    Full,
    /// Not now: the rate does not allow it, or there is more than a batch.
    Later,
    /// There will be no more in this stage.
    Done,
}

/// A disk with its record and its workload.
pub struct Worker {
    number: u32,
    disk: Disk,
    record: Record<'static>,
    random: Random,
    /// Bytes per block.
    block: u64,
    /// Blocks of a request that is made to cover ground.
    bulk: u64,
    /// Next block of the stages that go through the disk, and of sequential
    /// work.
    cursor: u64,
    /// Requests of the workload so far.
    requests: u64,
    /// When the rate allows the next request.
    allowed_ns: u64,
    /// When something ended last, or the disk stopped being idle.
    progress_ns: u64,
    report: DiskReport,
}

/// How much of a disk to use, in bytes: all, or what the command line says.
pub fn span_of(config: &Config, disk: &Disk) -> u64 {
    let bytes = disk.sectors().saturating_mul(SECTOR);
    let span = if config.span == 0 {
        bytes
    } else {
        config.span.min(bytes)
    };
    span / config.block * config.block
}

impl Worker {
    /// A worker for disk `number`. `words` has one word for each block of the
    /// span.
    pub fn new(number: u32, config: &Config, disk: Disk, words: &'static mut [u64]) -> Self {
        let record = Record::new(words);
        Self {
            number,
            random: Random::new(config.seed.wrapping_add(u64::from(number))),
            block: config.block,
            bulk: u64::from(disk.buffer_bytes()) / config.block,
            cursor: 0,
            requests: 0,
            allowed_ns: 0,
            progress_ns: 0,
            report: DiskReport {
                sectors: disk.sectors(),
                span: record.blocks() * (config.block / SECTOR),
                queues: disk.nr_queues(),
                depth: disk.depth(),
                ..DiskReport::default()
            },
            disk,
            record,
        }
    }

    /// Begins a stage; nothing is under way.
    pub fn begin(&mut self, now_ns: u64) {
        self.cursor = 0;
        self.allowed_ns = now_ns;
        self.progress_ns = now_ns;
    }

    /// What to tell of this disk.
    pub fn report(&self) -> DiskReport {
        DiskReport {
            last_generation: self.record.last_generation(),
            digest: self.record.digest(),
            ..self.report
        }
    }

    /// Requests failed and blocks found wrong.
    pub fn errors(&self) -> u64 {
        self.report.failed + self.report.mismatches
    }

    /// Requests under way.
    pub fn in_flight(&self) -> u32 {
        self.disk.in_flight()
    }

    /// Its disk, for sleeping.
    pub fn disk_mut(&mut self) -> &mut Disk {
        &mut self.disk
    }

    /// Takes in what has ended. Returns whether anything has.
    pub fn harvest(&mut self, stage: Stage, now_ns: u64, phases: &mut Phases) -> bool {
        let Self {
            number,
            disk,
            record,
            block,
            report,
            progress_ns,
            ..
        } = self;
        let counted = stage == Stage::Work;
        let ended = disk.harvest(|ended| {
            if ended.ok && counted {
                let request = ended.request;
                let ns = now_ns.saturating_sub(request.start_ns);
                let phase = phases.current_mut();
                phase.count(request.operation, u64::from(request.bytes), ns);
            }
            finish(*number, *block, stage, record, report, ended);
        });
        if ended > 0 {
            if counted {
                let idle_ns = now_ns.saturating_sub(*progress_ns);
                phases.current_mut().stalled(idle_ns);
            }
            *progress_ns = now_ns;
        }
        ended > 0
    }

    /// Makes requests, as many as there is room for.
    pub fn feed(&mut self, stage: Stage, config: &Config, clock: &Clock, stop: bool) -> Fed {
        let was_idle = self.disk.in_flight() == 0;
        let mut fed = Fed::Later;
        for _ in 0..BATCH {
            if !self.disk.has_room() {
                fed = Fed::Full;
                break;
            }
            let now_ns = clock.now_ns();
            let made = match stage {
                Stage::Work => self.work(config, now_ns, stop),
                Stage::Settle => self.settle(now_ns),
                Stage::Flush => self.last_flush(now_ns),
                Stage::Fill => {
                    let end = (config.fill / self.block).min(self.record.blocks());
                    self.sweep(Operation::Write, end, now_ns)
                }
                Stage::Adopt | Stage::Verify => {
                    let end = self.record.blocks();
                    self.sweep(Operation::Read, end, now_ns)
                }
            };
            if let Err(why) = made {
                fed = why;
                break;
            }
            if was_idle {
                self.progress_ns = now_ns;
            }
        }
        self.disk.publish();
        fed
    }

    fn work(&mut self, config: &Config, now_ns: u64, stop: bool) -> Result<(), Fed> {
        if stop || (config.requests > 0 && self.requests >= config.requests) {
            return Err(Fed::Done);
        }
        if let Some(interval_ns) = 1_000_000_000u64.checked_div(config.rate) {
            if now_ns < self.allowed_ns {
                return Err(Fed::Later);
            }
            // After a stall the rate may be caught up with for one full queue.
            let oldest = now_ns.saturating_sub(interval_ns * u64::from(self.disk.depth()));
            self.allowed_ns = self.allowed_ns.max(oldest) + interval_ns;
        }
        let wanted = config.operation(self.random.below(config.total_weight()));
        let operation = [wanted, Operation::Flush]
            .into_iter()
            .find(|&operation| self.disk.takes(operation))
            .unwrap_or(Operation::Write);
        if operation == Operation::Flush {
            self.requests += 1;
            return self.submit(Operation::Flush, Run { first: 0, count: 0 }, now_ns);
        }
        let run = self.choose(config).ok_or(Fed::Later)?;
        self.requests += 1;
        self.submit(operation, run, now_ns)
    }

    /// Chooses a run of blocks by the order, and claims it.
    fn choose(&mut self, config: &Config) -> Option<Run> {
        let min = config.size_min / self.block;
        let max = config.size_max / self.block;
        for _ in 0..TRIES {
            let count = min + self.random.below(max - min + 1);
            let blocks = self.record.blocks();
            let first = match config.order {
                Order::Sequential => {
                    let first = if self.cursor + count > blocks {
                        0
                    } else {
                        self.cursor
                    };
                    self.cursor = first + count;
                    first
                }
                // Requests of one size lie at multiples of it.
                Order::Random if min == max => self.random.below(blocks / count) * count,
                Order::Random => self.random.below(blocks - count + 1),
            };
            let run = Run { first, count };
            if self.record.claim(run) {
                return Some(run);
            }
        }
        None
    }

    fn sweep(&mut self, operation: Operation, end: u64, now_ns: u64) -> Result<(), Fed> {
        let run = Run {
            first: self.cursor,
            count: self.bulk.min(end.saturating_sub(self.cursor)),
        };
        if run.count == 0 {
            return Err(Fed::Done);
        }
        self.cursor += run.count;
        // Nothing else is under way in such a stage: the claim cannot fail.
        self.record.claim(run);
        self.submit(operation, run, now_ns)
    }

    fn settle(&mut self, now_ns: u64) -> Result<(), Fed> {
        let first = self.record.next_unknown(self.cursor).ok_or(Fed::Done)?;
        // One try each: a block that cannot be written stays open.
        self.cursor = first + 1;
        let run = Run { first, count: 1 };
        self.record.claim(run);
        self.submit(Operation::Write, run, now_ns)
    }

    fn last_flush(&mut self, now_ns: u64) -> Result<(), Fed> {
        if self.cursor > 0 || !self.disk.takes(Operation::Flush) {
            return Err(Fed::Done);
        }
        self.cursor = 1;
        self.submit(Operation::Flush, Run { first: 0, count: 0 }, now_ns)
    }

    /// Submits a request for a claimed run. There is room.
    fn submit(&mut self, operation: Operation, run: Run, now_ns: u64) -> Result<(), Fed> {
        let generation = if operation == Operation::Write {
            self.record.next_generation()
        } else {
            0
        };
        let request = Request {
            operation,
            sector: run.first * (self.block / SECTOR),
            bytes: (run.count * self.block) as u32,
            tag: generation,
            start_ns: now_ns,
        };
        let number = self.number;
        self.disk.submit(request, |data| {
            sector::write_block(number, request.sector, generation, data);
        });
        Ok(())
    }
}

/// Takes the end of a request into the record, and checks what was read.
fn finish(
    disk: u32,
    block: u64,
    stage: Stage,
    record: &mut Record<'_>,
    report: &mut DiskReport,
    ended: Ended<'_>,
) {
    let Ended { request, ok, data } = ended;
    let run = Run {
        first: request.sector / (block / SECTOR),
        count: u64::from(request.bytes) / block,
    };
    if !ok {
        report.failed += 1;
    }
    match request.operation {
        Operation::Flush => {}
        Operation::Write if ok => {
            report.lag = report.lag.max(record.last_generation() - request.tag);
            record.finish_write(run, request.tag);
        }
        Operation::WriteZeroes if ok => record.finish_write(run, 0),
        Operation::Write | Operation::WriteZeroes | Operation::Discard => {
            record.finish_unknown(run);
        }
        Operation::Read => {
            record.finish_read(run);
            if !ok {
                return;
            }
            for (number, bytes) in (run.first..).zip(data.chunks_exact(block as usize)) {
                let first_sector = number * (block / SECTOR);
                let found = sector::read_block(disk, first_sector, bytes);
                let expected = match (stage, found) {
                    (Stage::Adopt, Ok(generation)) => {
                        record.adopt(number, generation);
                        continue;
                    }
                    (Stage::Adopt, Err(_)) => 0,
                    _ => match record.expected(number) {
                        Some(expected) => expected,
                        None => continue,
                    },
                };
                if found != Ok(expected) {
                    report.mismatches += 1;
                    report.first.get_or_insert(Mismatch {
                        block: number,
                        expected,
                        found,
                    });
                }
            }
        }
    }
}
