//! The guest's end of the mailbox (see `guest::mailbox`).

use guest::mailbox::{ORDER_OFFSET, Order, STATUS_OFFSET, Status};
use guest::phase::Operation;
use guest::sector::SECTOR_BYTES;

use crate::disk::{Disk, Request};

const SECTOR: u64 = SECTOR_BYTES as u64;

/// Fetches orders and sends status, every few milliseconds.
pub struct Post {
    disk: Disk,
    interval_ns: u64,
    next_ns: u64,
    order: Order,
}

impl Post {
    /// A mailbox on `disk`, which nobody else uses.
    pub fn new(disk: Disk, interval_ms: u64) -> Self {
        Self {
            disk,
            interval_ns: interval_ms * 1_000_000,
            next_ns: 0,
            order: Order::default(),
        }
    }

    /// The last order that came.
    pub fn order(&self) -> Order {
        self.order
    }

    /// Ends and begins requests as they are due; never waits.
    pub fn poll(&mut self, now_ns: u64, status: impl FnOnce() -> Status) {
        let mut news = None;
        self.disk.harvest(|ended| {
            if ended.request.operation == Operation::Read
                && ended.ok
                && let Some(sector) = ended.data.first_chunk()
            {
                news = Order::decode(sector);
            }
        });
        if let Some(order) = news
            && order != self.order
        {
            self.order = order;
            // Answer at the next call, when the order has been obeyed.
            self.next_ns = now_ns;
            return;
        }
        if now_ns < self.next_ns || self.disk.in_flight() > 0 {
            return;
        }
        self.next_ns = now_ns + self.interval_ns;
        let request = |operation, offset| Request {
            operation,
            sector: offset / SECTOR,
            bytes: SECTOR as u32,
            tag: 0,
            start_ns: now_ns,
        };
        let sector = status().encode();
        self.disk
            .submit(request(Operation::Write, STATUS_OFFSET), |data| {
                data.copy_from_slice(&sector);
            });
        self.disk
            .submit(request(Operation::Read, ORDER_OFFSET), |_| ());
        self.disk.publish();
    }
}
