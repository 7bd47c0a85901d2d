//! Measures the file driver: random requests at a queue depth, on one iothread.
//!
//! `random_io PATH read|write [BLOCK_BYTES [DEPTH [SECONDS [direct]]]]`
//!
//! The image must exist; `write` overwrites it. Compare with `fio
//! --ioengine=io_uring --rw=randread --bs=4k --iodepth=32`.

use std::cell::Cell;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::drivers::file::{self, FileDriver, OpenFlags};
use block::runtime::{EventLoop, Iothread, spawn_local};
use block::{AlignedBuffer, BlockDriver, CacheOptions, FileOptions, WriteFlags};

struct Load {
    write: bool,
    block: u64,
    depth: usize,
    time: Duration,
}

/// A cheap random number (xorshift64).
fn random(state: &Cell<u64>) -> u64 {
    let mut x = state.get();
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    state.set(x);
    x
}

/// Runs the load; gives the number of requests done.
async fn run(driver: Arc<FileDriver>, load: Load) -> u64 {
    let end = Instant::now() + load.time;
    let done = Rc::new(Cell::new(0));
    let state = Rc::new(Cell::new(0x9e37_79b9_7f4a_7c15));
    let blocks = driver.size() / load.block;
    let tasks: Vec<_> = (0..load.depth)
        .map(|_| {
            let (driver, done, state) = (Arc::clone(&driver), Rc::clone(&done), Rc::clone(&state));
            let Load { write, block, .. } = load;
            spawn_local(async move {
                let iov = AlignedBuffer::new(block as usize).io_vec(block as usize);
                iov.fill(0x5a);
                while done.get() % 64 != 0 || Instant::now() < end {
                    let offset = random(&state) % blocks * block;
                    let result = if write {
                        driver
                            .write(offset, iov.clone(), WriteFlags::default())
                            .await
                    } else {
                        driver.read(offset, iov.clone()).await
                    };
                    if let Err(error) = result {
                        eprintln!("{error}");
                        return;
                    }
                    done.set(done.get() + 1);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await;
    }
    done.get()
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| match args.get(at) {
        Some(text) => text.parse().unwrap_or(default).max(1),
        None => default,
    };
    let (Some(path), Some(mode)) = (args.first(), args.get(1)) else {
        eprintln!("usage: random_io PATH read|write [BLOCK_BYTES [DEPTH [SECONDS [direct]]]]");
        return ExitCode::from(2);
    };
    let load = Load {
        write: mode == "write",
        block: number(2, 4096),
        depth: number(3, 32) as usize,
        time: Duration::from_secs(number(4, 3)),
    };
    let options = FileOptions {
        filename: PathBuf::from(path),
        locking: None,
        host_device: false,
        bitmap_file: None,
    };
    let flags = OpenFlags {
        cache: CacheOptions {
            direct: args.get(5).is_some_and(|arg| arg == "direct"),
            no_flush: false,
        },
        ..OpenFlags::default()
    };
    let driver = match file::open("image", &options, flags) {
        Ok(driver) => Arc::new(driver),
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let start = Instant::now();
    let result = EventLoop::new("main").and_then(|main| {
        let iothread = Iothread::spawn("io0")?;
        main.block_on(
            iothread
                .handle()
                .call(move || async move { run(driver, load).await }),
        )
    });
    match result {
        Ok(done) => {
            let rate = done as f64 / start.elapsed().as_secs_f64();
            println!("{done} requests, {rate:.0}/s");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
