import { describe, expect, it } from 'vitest';
import { EXPORT, OPTION, OPTION_ERROR, REPLY } from '#src/nbd/protocol/numbers.js';
import { type Offer, ServerHandshake, type Step } from '#src/nbd/protocol/server-handshake.js';

const disk: Offer = {
  name: 'disk',
  description: 'a drive',
  length: 2 ** 40 + 512,
  flags: 0b1101,
  contexts: ['base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:monday'],
};
const flags = EXPORT.hasFlags | EXPORT.multiConn;
const other: Offer = { ...disk, name: 'ö', description: '', length: 512, flags };

interface Reply {
  readonly option: number;
  readonly type: number;
  readonly data: Buffer;
}

/** A client that says whatever it is told to. */
class Client {
  readonly handshake: ServerHandshake;
  last: Step = { send: [], next: 'continue' };
  closing = false;

  constructor(rules: { tls?: 'none' | 'required'; flags?: number; single?: boolean } = {}) {
    this.handshake = new ServerHandshake({
      offers: () => [disk, other],
      tls: rules.tls ?? 'none',
      closing: () => this.closing,
      single: rules.single ?? false,
    });
    this.say(uint32(rules.flags ?? 3));
  }

  /** Everything that is sent while the bytes are taken, as much at a time as is wanted. */
  say(bytes: Uint8Array): Buffer {
    const sent: Uint8Array[] = [];
    for (let at = 0; at < bytes.length; ) {
      const { wanted } = this.handshake;
      expect(bytes.length - at).toBeGreaterThanOrEqual(wanted);
      this.last = this.handshake.take(bytes.subarray(at, at + wanted));
      at += wanted;
      sent.push(...this.last.send);
      if (this.last.next === 'close') break;
    }
    return Buffer.concat(sent);
  }

  option(option: number, ...data: readonly Uint8Array[]): Reply[] {
    const bytes = Buffer.concat(data);
    return replies(
      this.say(Buffer.concat([Buffer.from('IHAVEOPT'), uint32(option), uint32(bytes.length), bytes])),
    );
  }

  /** Types of the answers. */
  types(option: number, ...data: readonly Uint8Array[]): number[] {
    return this.option(option, ...data).map(({ type }) => type);
  }
}

function replies(bytes: Buffer): Reply[] {
  const list: Reply[] = [];
  for (let at = 0; at < bytes.length; ) {
    expect(bytes.readBigUInt64BE(at)).toBe(0x0003e889045565a9n);
    const length = bytes.readUInt32BE(at + 16);
    const data = bytes.subarray(at + 20, at + 20 + length);
    expect(data.length).toBe(length);
    list.push({ option: bytes.readUInt32BE(at + 8), type: bytes.readUInt32BE(at + 12), data });
    at += 20 + length;
  }
  return list;
}

function uint16(value: number): Buffer {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16BE(value);
  return bytes;
}

function uint32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

function counted(text: string | Uint8Array): Buffer {
  const bytes = Buffer.from(text);
  return Buffer.concat([uint32(bytes.length), bytes]);
}

function queries(...list: readonly string[]): Buffer {
  return Buffer.concat([uint32(list.length), ...list.map(counted)]);
}

const plainGo = [counted('disk'), uint16(0)] as const;

describe('greeting and flags', () => {
  it('greets as the fixed new style does', () => {
    expect(Buffer.from(ServerHandshake.greeting()).toString('hex')).toBe(
      '4e42444d41474943' + '49484156454f5054' + '0003',
    );
  });

  it.each([4, 0x80000000, 7])('puts out who sets the unknown flags %i', (flags) => {
    expect(new Client({ flags }).last.next).toBe('close');
  });

  it('lets who knows no answers only choose an export', () => {
    const client = new Client({ flags: 0 });
    client.option(OPTION.list);
    expect(client.last.next).toBe('close');
    const old = new Client({ flags: 0 });
    const bytes = old.say(Buffer.concat([Buffer.from('IHAVEOPT'), uint32(1), counted('disk')]));
    expect(bytes.length).toBe(134);
    expect(bytes.readBigUInt64BE(0)).toBe(2n ** 40n + 512n);
    expect(bytes.readUInt16BE(8)).toBe(0b1101);
    expect(old.last.next).toBe('transmission');
  });

  it('puts out who does not speak of options', () => {
    const client = new Client();
    client.say(Buffer.alloc(16, 7));
    expect(client.last.next).toBe('close');
  });
});

describe('options', () => {
  it('lists exports', () => {
    const [first, second, last] = new Client().option(OPTION.list);
    expect([first?.type, second?.type, last?.type]).toEqual([REPLY.server, REPLY.server, REPLY.ack]);
    expect(first?.data.toString()).toBe('\0\0\0\x04diska drive');
    expect(second?.data).toEqual(counted('ö'));
  });

  it('acknowledges leave, whatever comes with it', () => {
    const client = new Client();
    expect(client.types(OPTION.abort, Buffer.from('bye'))).toEqual([REPLY.ack]);
    expect(client.last.next).toBe('close');
  });

  it('goes on after options it does not know, however long', () => {
    const client = new Client();
    expect(client.types(99, Buffer.alloc(16))).toEqual([OPTION_ERROR.unsupported]);
    expect(client.types(4)).toEqual([OPTION_ERROR.unsupported]);
    expect(client.types(99, Buffer.alloc(2 ** 21 + 5))).toEqual([OPTION_ERROR.unsupported]);
    expect(client.types(OPTION.list)).toHaveLength(3);
  });

  it('puts out who sends an option of more than 32 MiB', () => {
    const client = new Client();
    client.say(Buffer.concat([Buffer.from('IHAVEOPT'), uint32(99), uint32(2 ** 25 + 1)]));
    expect(client.last.next).toBe('close');
  });

  it.each([OPTION.list, OPTION.startTls, OPTION.structuredReply, OPTION.extendedHeaders])(
    'refuses data with the option %i and goes on',
    (option) => {
      const client = new Client();
      expect(client.types(option, Buffer.alloc(4))).toEqual([OPTION_ERROR.invalid]);
      expect(client.types(OPTION.list)).toHaveLength(3);
    },
  );

  it('tells of an export and starts with it', () => {
    const client = new Client();
    const info = client.option(OPTION.info, counted('disk'), uint16(3), ...[1, 2, 3].map(uint16));
    expect(client.last.next).toBe('continue');
    expect(info.map(({ data }) => data.toString('hex'))).toEqual([
      '0000' + '0000010000000200' + '000d',
      `0001${Buffer.from('disk').toString('hex')}`,
      `0002${Buffer.from('a drive').toString('hex')}`,
      '0003' + '00000001' + '00001000' + '02000000',
      '',
    ]);
    const go = client.option(OPTION.go, counted('disk'), uint16(3), ...[1, 2, 3].map(uint16));
    expect(go.map(({ data }) => data)).toEqual(info.map(({ data }) => data));
    expect(client.last).toMatchObject({
      next: 'transmission',
      agreement: { offer: disk, headers: 'simple', contexts: [] },
    });
  });

  it('says what can be asked only where it was agreed on', () => {
    const client = new Client();
    expect(client.types(OPTION.structuredReply)).toEqual([REPLY.ack]);
    expect(client.types(OPTION.structuredReply)).toEqual([OPTION_ERROR.invalid]);
    client.option(OPTION.go, ...plainGo);
    expect(client.last).toMatchObject({ agreement: { headers: 'structured', flags: 0b10001101 } });
    const extended = new Client();
    expect(extended.types(OPTION.extendedHeaders)).toEqual([REPLY.ack]);
    expect(extended.types(OPTION.extendedHeaders)).toEqual([OPTION_ERROR.invalid]);
    expect(extended.types(OPTION.structuredReply)).toEqual([OPTION_ERROR.extendedHeadersRequired]);
    extended.option(OPTION.go, ...plainGo);
    expect(extended.last).toMatchObject({ agreement: { headers: 'extended', flags: 0b1000010001101 } });
  });

  it('speaks of several connections only where there is room for a second one', () => {
    const offered = [false, true].map((single) => {
      const client = new Client({ single });
      client.option(OPTION.go, counted('ö'), uint16(0));
      return client.last.next === 'transmission' ? client.last.agreement.flags : undefined;
    });
    expect(offered).toEqual([flags, EXPORT.hasFlags]);
  });

  it('never gives an export by name alone to who wants extended headers', () => {
    const client = new Client();
    client.option(OPTION.extendedHeaders);
    client.say(Buffer.concat([Buffer.from('IHAVEOPT'), uint32(1), counted('disk')]));
    expect(client.last).toEqual({ send: [], next: 'close' });
  });

  it.each([
    ['no name', Buffer.alloc(0)],
    ['half a length', Buffer.alloc(3)],
    ['a name longer than the option', Buffer.concat([uint32(2 ** 32 - 1), Buffer.from('disk'), uint16(0)])],
    ['no number of questions', counted('disk')],
    ['fewer questions than it says', Buffer.concat([counted('disk'), uint16(2), uint16(3)])],
    ['more questions than it says', Buffer.concat([counted('disk'), uint16(0), uint16(3)])],
    ['a name of 4097 bytes', Buffer.concat([counted(Buffer.alloc(4097, 97)), uint16(0)])],
    ['a name with a NUL', Buffer.concat([counted('di\0sk'), uint16(0)])],
    ['a name that is no UTF-8', Buffer.concat([counted(Buffer.from([0xff, 0xfe])), uint16(0)])],
  ])('refuses to go with %s and goes on', (_, data) => {
    for (const option of [OPTION.go, OPTION.info]) {
      const client = new Client();
      expect(client.types(option, data)).toEqual([OPTION_ERROR.invalid]);
      expect(client.types(OPTION.list)).toHaveLength(3);
    }
  });

  it('does not know exports by half their names, and says little of what it was asked', () => {
    const client = new Client();
    for (const name of ['', 'dis', 'disk2', 'DISK', 'x'.repeat(4096)]) {
      const [refusal] = client.option(OPTION.go, counted(name), uint16(0));
      expect(refusal?.type).toBe(OPTION_ERROR.unknown);
      expect(refusal?.data.length).toBeLessThan(100);
    }
    expect(client.types(OPTION.go, counted('ö'), uint16(0)).at(-1)).toBe(REPLY.ack);
  });

  it('takes on nobody while it is closing', () => {
    const client = new Client();
    client.closing = true;
    expect(client.types(OPTION.go, ...plainGo)).toEqual([OPTION_ERROR.shutdown]);
    expect(client.types(OPTION.abort)).toEqual([REPLY.ack]);
  });
});

describe('metadata contexts', () => {
  const names = (list: readonly Reply[]) =>
    list.slice(0, -1).map(({ data }) => [data.readUInt32BE(0), data.toString('utf8', 4)]);

  function choosing(): Client {
    const client = new Client();
    client.option(OPTION.structuredReply);
    return client;
  }

  it('lists them all, or those that are asked for', () => {
    const client = new Client();
    const list = (...asked: readonly string[]) =>
      names(client.option(OPTION.listMetaContext, counted('disk'), queries(...asked))).map(([id, name]) => {
        expect(id).toBe(0);
        return name;
      });
    expect(list()).toEqual(disk.contexts);
    expect(list('qemu:')).toEqual(disk.contexts.slice(1));
    expect(list('base:', 'qemu:dirty-bitmap:')).toEqual([disk.contexts[0], disk.contexts[2]]);
    expect(list('base:allocation', 'base:', 'other:thing', 'base')).toEqual([disk.contexts[0]]);
  });

  it('chooses by whole names, each once', () => {
    const client = choosing();
    const chosen = client.option(
      OPTION.setMetaContext,
      counted('disk'),
      queries('qemu:dirty-bitmap:monday', 'base:allocation', 'base:allocation', 'qemu:', 'x-y:z'),
    );
    expect(names(chosen)).toEqual([
      [1, 'base:allocation'],
      [3, 'qemu:dirty-bitmap:monday'],
    ]);
    client.option(OPTION.go, ...plainGo);
    expect(client.last).toMatchObject({ agreement: { contexts: [1, 3] } });
  });

  it('forgets the choice with the next one, also where that is wrong, and for other exports', () => {
    const contexts = (...options: readonly (readonly [number, ...Uint8Array[]])[]) => {
      const client = choosing();
      client.option(OPTION.setMetaContext, counted('disk'), queries('base:allocation'));
      for (const option of options) client.option(...option);
      const { last } = client;
      return last.next === 'transmission' ? last.agreement.contexts : undefined;
    };
    const go = [OPTION.go, ...plainGo] as const;
    expect(contexts(go)).toEqual([1]);
    expect(contexts([OPTION.setMetaContext, counted('disk'), queries()], go)).toEqual([]);
    expect(contexts([OPTION.setMetaContext, counted('nothing'), queries('base:allocation')], go)).toEqual([]);
    expect(contexts([OPTION.setMetaContext, counted('disk'), uint32(7)], go)).toEqual([]);
    expect(contexts([OPTION.go, counted('ö'), uint16(0)])).toEqual([]);
  });

  it.each([
    [
      'without structured replies',
      false,
      [counted('disk'), queries('base:allocation')],
      OPTION_ERROR.invalid,
    ],
    ['of an unknown export', true, [counted('?'), queries('base:allocation')], OPTION_ERROR.unknown],
    [
      'with bytes left over',
      true,
      [counted('disk'), queries('base:allocation'), uint16(1)],
      OPTION_ERROR.invalid,
    ],
    [
      'with what looks like another option left over',
      true,
      [counted('disk'), queries(), Buffer.from('IHAVEOPT'), Buffer.alloc(8)],
      OPTION_ERROR.invalid,
    ],
    ['with a query that goes on', true, [counted('disk'), uint32(1), uint32(99)], OPTION_ERROR.invalid],
    ['with a query of 5000 bytes', true, [counted('disk'), queries('x'.repeat(5000))], OPTION_ERROR.invalid],
    [
      'with 100,000 queries',
      true,
      [counted('disk'), uint32(100_000), Buffer.alloc(400_000)],
      OPTION_ERROR.tooBig,
    ],
    ['without a number', true, [counted('disk')], OPTION_ERROR.invalid],
  ])('refuses a choice %s and goes on', (_, structured, data, error) => {
    const client = structured ? choosing() : new Client();
    expect(client.types(OPTION.setMetaContext, ...data)).toEqual([error]);
    expect(client.types(OPTION.list)).toHaveLength(3);
  });
});

describe('TLS', () => {
  it('is refused where it is not set up', () => {
    const client = new Client();
    expect(client.types(OPTION.startTls)).toEqual([OPTION_ERROR.policy]);
    expect(client.last.next).toBe('continue');
  });

  it('comes before everything else where it is required', () => {
    const client = new Client({ tls: 'required' });
    for (const option of [OPTION.list, OPTION.structuredReply, OPTION.extendedHeaders, 99]) {
      expect(client.types(option)).toEqual([OPTION_ERROR.tlsRequired]);
    }
    expect(client.types(OPTION.go, ...plainGo)).toEqual([OPTION_ERROR.tlsRequired]);
    expect(client.types(OPTION.startTls)).toEqual([REPLY.ack]);
    expect(client.last.next).toBe('start-tls');
    client.handshake.secured();
    expect(client.types(OPTION.startTls)).toEqual([OPTION_ERROR.invalid]);
    expect(client.types(OPTION.structuredReply)).toEqual([REPLY.ack]);
    const unasked = new Client({ tls: 'required' });
    unasked.say(Buffer.concat([Buffer.from('IHAVEOPT'), uint32(1), counted('disk')]));
    expect(unasked.last.next).toBe('close');
  });
});
