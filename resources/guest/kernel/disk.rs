//! A virtio-blk disk (virtio 1.2 §5.2) and the requests under way on it.

use core::slice;

use guest::phase::Operation;
use guest::sector::SECTOR_BYTES;

use crate::memory::Arena;
use crate::virtio::{Mmio, Part, Queue, feature};

const HEADER_BYTES: u32 = 16;
const STATUS_OK: u8 = 0;
const STATUS_NONE: u8 = 0xff;

/// Why a disk cannot be used.
#[derive(Debug)]
pub enum DiskError {
    /// There is no virtio-mmio version 2 disk.
    NotADisk,
    /// The device refused the features.
    Features,
    /// A queue is missing or too short.
    Queue,
    /// The memory does not suffice.
    Memory,
}

impl DiskError {
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::NotADisk => "not a virtio-blk device of version 2",
            Self::Features => "the device refuses VERSION_1",
            Self::Queue => "a queue is missing or too short",
            Self::Memory => "not enough memory",
        }
    }
}

/// A request under way: what the caller wants to know when it has ended.
#[derive(Clone, Copy)]
pub struct Request {
    pub operation: Operation,
    /// First sector; 0 for a flush.
    pub sector: u64,
    /// Length in bytes: at most the size of a buffer if there is data.
    pub bytes: u32,
    /// The caller's own number.
    pub tag: u64,
    /// When it was submitted, in ns.
    pub start_ns: u64,
}

/// A request that has ended.
pub struct Ended<'a> {
    pub request: Request,
    pub ok: bool,
    /// The data of a read or write; empty for others.
    pub data: &'a mut [u8],
}

struct Slots {
    queue: Queue,
    /// Requests by number; `None` if free.
    requests: &'static mut [Option<Request>],
    /// Numbers of free requests, a stack.
    free: &'static mut [u16],
    nr_free: usize,
    headers: *mut u8,
    status: *mut u8,
    buffers: *mut u8,
}

/// A disk that is ready for requests.
pub struct Disk {
    mmio: Mmio,
    queues: [Option<Slots>; MAX_QUEUES],
    nr_queues: usize,
    next_queue: usize,
    depth: u32,
    in_flight: u32,
    buffer_bytes: u32,
    sectors: u64,
    logical_block: u32,
    features: u64,
}

/// The most queues of a disk.
pub const MAX_QUEUES: usize = 16;

/// What a disk shall have.
#[derive(Clone, Copy)]
pub struct DiskOptions {
    pub queues: u16,
    pub depth: u16,
    pub buffer_bytes: u32,
    pub event_idx: bool,
}

impl Disk {
    /// Sets the device at `base` up. Gets fewer queues and less depth than
    /// wanted if the device has less to give.
    pub fn new(arena: &mut Arena, base: u64, options: DiskOptions) -> Result<Self, DiskError> {
        let mmio = Mmio::new(base);
        if !mmio.is_disk() {
            return Err(DiskError::NotADisk);
        }
        let mut wanted = feature::VERSION_1
            | feature::BLK_SIZE_MAX
            | feature::BLK_BLK_SIZE
            | feature::BLK_FLUSH
            | feature::BLK_MQ
            | feature::BLK_DISCARD
            | feature::BLK_WRITE_ZEROES;
        if options.event_idx {
            wanted |= feature::EVENT_IDX;
        }
        let features = mmio.negotiate(wanted).ok_or(DiskError::Features)?;
        if features & feature::VERSION_1 == 0 {
            return Err(DiskError::Features);
        }
        let offers = |bit| features & bit != 0;
        let nr_queues = if offers(feature::BLK_MQ) {
            usize::from(mmio.config_u16(34).min(options.queues).max(1))
        } else {
            1
        };
        let buffer_bytes = if offers(feature::BLK_SIZE_MAX) {
            options.buffer_bytes.min(mmio.config_u32(8))
        } else {
            options.buffer_bytes
        };
        let mut disk = Self {
            mmio,
            queues: [const { None }; MAX_QUEUES],
            nr_queues,
            next_queue: 0,
            depth: 0,
            in_flight: 0,
            buffer_bytes,
            sectors: u64::from(mmio.config_u32(0)) | u64::from(mmio.config_u32(4)) << 32,
            logical_block: if offers(feature::BLK_BLK_SIZE) {
                mmio.config_u32(20)
            } else {
                SECTOR_BYTES as u32
            },
            features,
        };
        for index in 0..nr_queues {
            let room = Queue::requests_in(mmio.queue_num_max(index as u16));
            let depth = options.depth.min(room);
            if depth == 0 {
                return Err(DiskError::Queue);
            }
            let slots = Slots::new(
                arena,
                mmio,
                index as u16,
                depth,
                buffer_bytes,
                offers(feature::EVENT_IDX),
            )?;
            disk.depth += u32::from(depth);
            disk.queues[index] = Some(slots);
        }
        mmio.driver_ok();
        Ok(disk)
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The smallest unit of requests, in bytes.
    pub fn logical_block(&self) -> u32 {
        self.logical_block
    }

    /// The most data that one request takes, in bytes.
    pub fn buffer_bytes(&self) -> u32 {
        self.buffer_bytes
    }

    /// Whether the device takes such requests.
    pub fn takes(&self, operation: Operation) -> bool {
        let bit = match operation {
            Operation::Read | Operation::Write => return true,
            Operation::Flush => feature::BLK_FLUSH,
            Operation::Discard => feature::BLK_DISCARD,
            Operation::WriteZeroes => feature::BLK_WRITE_ZEROES,
        };
        self.features & bit != 0
    }

    /// Queues in use.
    pub fn nr_queues(&self) -> u16 {
        self.nr_queues as u16
    }

    /// Requests that can be under way, over all queues.
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// Requests under way.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Whether another request can be submitted.
    pub fn has_room(&self) -> bool {
        self.in_flight < self.depth
    }

    /// Submits a request, after `fill` has filled its buffer; the queues take
    /// turns. The device sees it after [`Self::publish`]. Returns false if
    /// there is no room or the request is larger than a buffer.
    pub fn submit(&mut self, request: Request, fill: impl FnOnce(&mut [u8])) -> bool {
        let has_data = matches!(request.operation, Operation::Read | Operation::Write);
        if has_data && request.bytes > self.buffer_bytes {
            return false;
        }
        for _ in 0..self.nr_queues {
            let index = self.next_queue;
            self.next_queue = (self.next_queue + 1) % self.nr_queues;
            if let Some(slots) = &mut self.queues[index]
                && slots.nr_free > 0
            {
                slots.submit(request, self.buffer_bytes, fill);
                self.in_flight += 1;
                return true;
            }
        }
        false
    }

    /// Shows the device what was submitted.
    pub fn publish(&mut self) {
        for slots in self.queues.iter_mut().flatten() {
            slots.queue.publish();
        }
    }

    /// Gives each request that has ended to `take`. Returns how many.
    pub fn harvest(&mut self, mut take: impl FnMut(Ended<'_>)) -> u32 {
        let mut ended = 0;
        for slots in self.queues.iter_mut().flatten() {
            while let Some(number) = slots.queue.pop() {
                if slots.end(number, self.buffer_bytes, &mut take) {
                    ended += 1;
                }
            }
        }
        self.in_flight -= ended;
        ended
    }

    /// Asks for an interrupt when the next request ends. Returns false if one
    /// has ended already.
    pub fn prepare_sleep(&mut self) -> bool {
        for slots in self.queues.iter_mut().flatten() {
            slots.queue.want_interrupt();
        }
        !self.queues.iter().flatten().any(|q| q.queue.has_used())
    }

    /// After a sleep: acknowledges the interrupt, and wants no more of them.
    pub fn end_sleep(&mut self) {
        self.mmio.acknowledge_interrupt();
        for slots in self.queues.iter_mut().flatten() {
            slots.queue.want_no_interrupt();
        }
    }
}

impl Slots {
    fn new(
        arena: &mut Arena,
        mmio: Mmio,
        index: u16,
        depth: u16,
        buffer_bytes: u32,
        event_idx: bool,
    ) -> Result<Self, DiskError> {
        let queue = Queue::new(arena, mmio, index, depth, event_idx).ok_or(DiskError::Queue)?;
        let n = usize::from(depth);
        let mut pages = |bytes: u64| arena.pages(bytes).ok_or(DiskError::Memory);
        let headers = pages(u64::from(HEADER_BYTES) * n as u64)?;
        let status = pages(n as u64)?;
        let buffers = pages(u64::from(buffer_bytes) * n as u64)?;
        let requests = arena.filled(n, None).ok_or(DiskError::Memory)?;
        let free: &mut [u16] = arena.filled(n, 0).ok_or(DiskError::Memory)?;
        for (number, free) in (0..depth).zip(free.iter_mut()) {
            *free = number;
        }
        Ok(Self {
            queue,
            requests,
            free,
            nr_free: n,
            headers,
            status,
            buffers,
        })
    }

    /// There is a free request.
    fn submit(&mut self, request: Request, buffer_bytes: u32, fill: impl FnOnce(&mut [u8])) {
        self.nr_free -= 1;
        let number = self.free[self.nr_free];
        self.requests[usize::from(number)] = Some(request);
        let (kind, device_writes) = match request.operation {
            Operation::Read => (0u32, true),
            Operation::Write => (1, false),
            Operation::Flush => (4, false),
            Operation::Discard => (11, false),
            Operation::WriteZeroes => (13, false),
        };
        let at = usize::from(number);
        let data = self.data(number, request.bytes, buffer_bytes);
        let data_bytes = match request.operation {
            Operation::Write => {
                fill(data);
                request.bytes
            }
            Operation::Read => request.bytes,
            Operation::Flush => 0,
            Operation::Discard | Operation::WriteZeroes => {
                let segment = self.data(number, 16, buffer_bytes);
                segment[..8].copy_from_slice(&request.sector.to_le_bytes());
                let sectors = request.bytes / SECTOR_BYTES as u32;
                segment[8..12].copy_from_slice(&sectors.to_le_bytes());
                segment[12..].fill(0);
                16
            }
        };
        let sector = match request.operation {
            Operation::Read | Operation::Write => request.sector,
            _ => 0,
        };
        // SAFETY: header and status of a request that was free.
        let (header, status, data) = unsafe {
            let header = self.headers.add(at * HEADER_BYTES as usize);
            header.cast::<u32>().write(kind);
            header.cast::<u32>().add(1).write(0);
            header.cast::<u64>().add(1).write(sector);
            let status = self.status.add(at);
            status.write_volatile(STATUS_NONE);
            (header, status, self.buffers.add(at * buffer_bytes as usize))
        };
        let header = Part {
            address: header,
            len: HEADER_BYTES,
            device_writes: false,
        };
        let data = Part {
            address: data,
            len: data_bytes,
            device_writes,
        };
        let status = Part {
            address: status,
            len: 1,
            device_writes: true,
        };
        // SAFETY: the number was free, and its header, data and status are
        // left alone until `end`.
        unsafe {
            if data_bytes == 0 {
                self.queue.push(number, &[header, status]);
            } else {
                self.queue.push(number, &[header, data, status]);
            }
        }
    }

    /// Ends a request; false if the device made its number up.
    fn end(&mut self, number: u16, buffer_bytes: u32, take: &mut impl FnMut(Ended<'_>)) -> bool {
        let Some(request) = self
            .requests
            .get_mut(usize::from(number))
            .and_then(Option::take)
        else {
            return false;
        };
        // SAFETY: in the array, and the device has ended the request.
        let status = unsafe { self.status.add(usize::from(number)).read_volatile() };
        let has_data = matches!(request.operation, Operation::Read | Operation::Write);
        let bytes = if has_data { request.bytes } else { 0 };
        take(Ended {
            request,
            ok: status == STATUS_OK,
            data: self.data(number, bytes, buffer_bytes),
        });
        self.free[self.nr_free] = number;
        self.nr_free += 1;
        true
    }

    /// The first bytes of a request's buffer. The request is not under way.
    fn data(&mut self, number: u16, bytes: u32, buffer_bytes: u32) -> &mut [u8] {
        let bytes = bytes.min(buffer_bytes) as usize;
        // SAFETY: the buffer is this request's, which is not under way, so
        // that the device leaves it alone; the slice borrows `self`.
        unsafe {
            let buffer = self
                .buffers
                .add(usize::from(number) * buffer_bytes as usize);
            slice::from_raw_parts_mut(buffer, bytes)
        }
    }
}
