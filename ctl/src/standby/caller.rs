// SPDX-License-Identifier: GPL-2.0-or-later

//! Somebody who has connected and said what for.

use std::io::Read;
use std::time::{Duration, Instant};

use anyhow::{bail, Result};
use remus_core::uapi::ram::PAGE_SIZE;
use remus_proto::disk::Disks;
use remus_proto::frame::{Header, Hello, Kind, Token};

use super::serve::Offer;
use crate::peer::channel::{Channel, ChannelWriter, Handle};
use crate::peer::door::Door;
use crate::peer::stream::{Receiver, Sender};

/// How long a caller may take to say what it wants.
pub const INTRODUCTION: Duration = Duration::from_secs(3);

/// Where callers come in.
pub type Callers = Door<Caller>;

/// Somebody who has sent its first frame.
pub struct Caller {
    /// What else it sends.
    pub receiver: Receiver,
    /// Both ways, to be ended.
    pub handle: Handle,
    writer: ChannelWriter,
    header: Header,
    payload: Vec<u8>,
}

impl Caller {
    /// Reads the first frame of who has connected.
    pub fn meet(channel: Channel) -> Result<Self> {
        let (reader, writer, handle) = channel.split();
        handle.set_write_timeout(Some(INTRODUCTION))?;
        let mut receiver = Receiver::new(reader, &handle, INTRODUCTION)?;
        let (header, payload) = match receiver.next() {
            Ok(first) => first,
            Err(e) => {
                let text = format!("{e}");
                refuse(
                    &Sender::new(writer, &handle, 0),
                    &handle,
                    Kind::Error,
                    &text,
                );
                return Err(e.into());
            }
        };
        Ok(Self {
            receiver,
            handle,
            writer,
            header,
            payload,
        })
    }

    /// Its hello, if it is the primary that `offer` is for; generation and run of it.
    pub fn hello(&self, offer: &Offer) -> Result<(u64, u128)> {
        if self.header.kind != Kind::Hello {
            bail!("the first frame is {:?}, not a hello", self.header.kind);
        }
        let hello = Hello::decode(&self.payload)?;
        if hello.name != offer.domain {
            bail!(
                "this standby is for domain {}, not for {}",
                offer.domain,
                hello.name
            );
        }
        if hello.memory != offer.memory {
            bail!(
                "domain {} has {} bytes of memory on the primary and {} on the standby: \
                 use the same configuration on both hosts",
                offer.domain,
                hello.memory,
                offer.memory
            );
        }
        if hello.page_size as usize != PAGE_SIZE {
            bail!(
                "the primary's pages have {} bytes, the standby's {PAGE_SIZE}",
                hello.page_size
            );
        }
        Ok((self.header.generation, hello.run))
    }

    /// Where it calls from.
    pub fn address(&self) -> String {
        let address = self.handle.peer_addr();
        match self.handle.peer_name() {
            Some(name) => format!("{name} ({address})"),
            None => address.to_string(),
        }
    }

    /// Whether it brings the data stream that belongs to `token`.
    pub fn attaches(&self, token: Token) -> bool {
        self.header.kind == Kind::Attach && Token::decode(&self.payload) == Ok(token)
    }

    /// The disks that it brings, if it brings a disk stream.
    pub fn disks(&self) -> Option<Disks> {
        let brings = self.header.kind == Kind::AttachDisks;
        Disks::decode(&self.payload).ok().filter(|_| brings)
    }

    /// Goes on with it, as of `generation`.
    pub fn accept(self, generation: u64) -> (Sender, Receiver, Handle) {
        let sender = Sender::new(self.writer, &self.handle, generation);
        (sender, self.receiver, self.handle)
    }

    /// Tells it why not, and closes so that it can read that.
    pub fn refuse(self, kind: Kind, why: &str) {
        let sender = Sender::new(self.writer, &self.handle, 0);
        refuse(&sender, &self.handle, kind, why);
    }
}

/// Tells the other side why nothing more comes, and closes so that it can read that.
pub fn refuse(sender: &Sender, handle: &Handle, kind: Kind, why: &str) {
    if sender.send(kind, 0, why.as_bytes()).is_err() {
        return;
    }
    let stream = handle.stream();
    let _ = stream.shutdown(std::net::Shutdown::Write);
    // What it still sends would make the kernel reset the connection, and the reason be lost.
    let _ = stream.set_read_timeout(Some(Duration::from_millis(300)));
    let (begin, mut sink) = (Instant::now(), [0; 1 << 14]);
    while begin.elapsed() < Duration::from_secs(1) {
        match (&mut &*stream).read(&mut sink) {
            Ok(n) if n > 0 => {}
            _ => break,
        }
    }
    handle.shutdown();
}
