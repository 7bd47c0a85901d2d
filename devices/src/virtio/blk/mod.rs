//! The virtio block device (virtio 1.2 §5.2): a disk in front of a
//! [`block::Backend`].
//!
//! - [`config`] — the disk's description and its configuration space.
//! - [`request`] — from descriptor chains to checked requests.
//! - [`execute`] — from requests to node operations.
//! - [`queue`] — the life of a queue on its iothread.
//! - [`stats`] — counters.

mod config;
mod execute;
mod queue;
mod request;
mod stats;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use block::{Backend, IoError};
use futures_channel::mpsc::{UnboundedSender, unbounded};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::config::ConfigSpace;
use self::queue::{Control, QueueSetup};
use self::request::Parser;
use self::stats::QueueStats;
use super::{Activation, VirtioDevice};
use crate::rate_limit::RateLimit;
use crate::ticket::{ResetTicket, TicketPart};

pub use config::{BlkConfigError, VirtioBlkConfig};
pub use stats::{BlkStats, OpStats};

/// What the device and its queues share.
struct Shared {
    config: VirtioBlkConfig,
    space: ConfigSpace,
    /// By queue.
    stats: Vec<QueueStats>,
    log: RateLimit,
}

impl Shared {
    fn log_failure(&self, error: &IoError) {
        if let Some(suppressed) = self.log.allow() {
            tracing::warn!(disk = self.config.id, %error, suppressed, "Request failed");
        }
    }

    fn log_broken(&self, queue: u16, error: &(dyn std::error::Error + 'static)) {
        if let Some(suppressed) = self.log.allow() {
            tracing::warn!(
                disk = self.config.id,
                queue,
                error,
                suppressed,
                "Driver misuses a queue: device needs a reset"
            );
        }
    }
}

/// A disk of a guest.
///
/// Its queues are served on the iothreads of its configuration. Dropping it
/// stops them; see [`VirtioDevice::reset`] for how to wait for that.
pub struct VirtioBlk {
    shared: Arc<Shared>,
    /// Taken by vCPU threads and main, for a few instructions. Nests in the
    /// transport's lock; nothing is sent while it is held.
    active: Mutex<ActiveQueues>,
}

#[derive(Default)]
struct ActiveQueues {
    paused: bool,
    queues: Vec<(u16, UnboundedSender<Control>)>,
}

impl VirtioBlk {
    /// A disk, not yet behind a transport.
    ///
    /// # Errors
    ///
    /// If the configuration is not possible.
    pub fn new(config: VirtioBlkConfig) -> Result<Self, BlkConfigError> {
        config.check()?;
        Ok(Self {
            shared: Arc::new(Shared {
                space: ConfigSpace::new(&config),
                stats: (0..config.num_queues)
                    .map(|_| QueueStats::default())
                    .collect(),
                log: RateLimit::new(),
                config,
            }),
            active: Mutex::new(ActiveQueues::default()),
        })
    }

    /// Its name in messages.
    pub fn id(&self) -> &str {
        &self.shared.config.id
    }

    /// What it was made of.
    pub fn config(&self) -> &VirtioBlkConfig {
        &self.shared.config
    }

    /// Where its data is.
    pub fn backend(&self) -> &Arc<Backend> {
        &self.shared.config.backend
    }

    /// Takes no more requests from the rings, and waits until those in flight
    /// have ended: the disk is quiet then. Requests that a drained section holds
    /// back stay where they are. Notifications are not lost: [`Self::resume`]
    /// looks at every ring.
    ///
    /// Main, with the vCPUs stopped. Lasts as long as the slowest request.
    /// Cancel: the device is paused all the same.
    pub async fn pause(&self) {
        let queues = {
            let mut active = self.lock();
            active.paused = true;
            active.queues.clone()
        };
        send_all(&queues, Control::Pause).done().await;
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&self) {
        let queues = {
            let mut active = self.lock();
            active.paused = false;
            active.queues.clone()
        };
        for (_, queue) in &queues {
            // Fails if the queue has stopped, or its iothread.
            let _ = queue.unbounded_send(Control::Resume);
        }
    }

    /// What the disk has done since it was made.
    pub fn stats(&self) -> BlkStats {
        stats::sum(&self.shared.stats)
    }

    /// How long the slowest request since the last call took, from the ring and
    /// back: the longest stall the guest has seen. One caller at a time makes
    /// sense of it.
    pub fn take_longest_latency(&self) -> Duration {
        self.shared
            .stats
            .iter()
            .map(QueueStats::take_longest)
            .max()
            .unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, ActiveQueues> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends each queue a message that the ticket waits for. A queue that has ended
/// (or its iothread) counts as done.
fn send_all(
    queues: &[(u16, UnboundedSender<Control>)],
    message: fn(TicketPart) -> Control,
) -> ResetTicket {
    let (ticket, parts) = ResetTicket::new(queues.len());
    for ((_, queue), part) in queues.iter().zip(parts) {
        // A message that does not arrive is dropped, and its part with it.
        let _ = queue.unbounded_send(message(part));
    }
    ticket
}

impl VirtioDevice for VirtioBlk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn num_queues(&self) -> u16 {
        self.shared.config.num_queues
    }

    fn queue_max_size(&self) -> u16 {
        self.shared.config.queue_size
    }

    fn features(&self) -> u64 {
        self.shared.config.features()
    }

    fn features_accepted(&self, features: u64) {
        self.shared.space.features_accepted(features);
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.space.read(&self.shared.config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8], features: u64) {
        self.shared.space.write(offset, data, features);
    }

    fn refresh_config(&self) -> bool {
        self.shared.space.refresh_capacity(&self.shared.config)
    }

    fn activate(&self, activation: Activation) {
        let Activation {
            mem,
            features,
            queues,
            notify,
            interrupt,
        } = activation;
        let config = &self.shared.config;
        for (index, queue) in queues {
            let (sender, control) = unbounded();
            let paused = {
                let mut active = self.lock();
                active.queues.push((index, sender));
                active.paused
            };
            let setup = QueueSetup {
                index,
                queue,
                shared: Arc::clone(&self.shared),
                parser: Parser::new(Arc::clone(&mem), config),
                features,
                interrupt: Arc::clone(&interrupt),
                kick: Arc::clone(&notify[usize::from(index)]),
                control,
                paused,
            };
            config.iothreads[usize::from(index) % config.iothreads.len()]
                .spawn(move || queue::serve(setup));
        }
    }

    fn stop_queue(&self, index: u16) -> ResetTicket {
        // It stays in the list, so that a reset waits for it too.
        let queues: Vec<_> = {
            let active = self.lock();
            let queue = active.queues.iter().filter(|(i, _)| *i == index);
            queue.cloned().collect()
        };
        send_all(&queues, Control::Stop)
    }

    fn reset(&self) -> ResetTicket {
        let queues = std::mem::take(&mut self.lock().queues);
        self.shared.space.reset(&self.shared.config);
        send_all(&queues, Control::Stop)
    }
}

#[cfg(test)]
mod tests;
